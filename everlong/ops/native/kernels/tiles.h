// Matrix products of bfloat16 numbers, summed in float32, whose operands lie in the cache.
//
//     C[rows, columns] = A B, or the sum of two such      rows, columns: multiples of 16; the depth of each: of 32
//
// A is stored row by row, the rows any distance apart: often they are the tokens themselves. B is stored in pairs, two
// rows side by side number by number, as the processors' instructions read it: [depth / 2][columns][2].
//
// One of three leaves computes it: AMX's tiles of 16 rows of 64 bytes, AVX-512's dot products of pairs, or float32
// arithmetic on widened numbers. A row's sums are taken in the same order wherever it stands.
#pragma once
#include "products.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Two bfloat16 numbers, the first in the lower half.
using Pair = uint32_t;

INLINE Words load_pairs(const void* from) {
  Words x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
INLINE void store_pairs(void* to, Words x) { std::memcpy(to, &x, sizeof x); }

// The first and the second number of each pair.
INLINE Vec firsts(Words pairs) { return (Vec)(pairs << 16); }
INLINE Vec seconds(Words pairs) { return (Vec)(pairs & 0xffff0000u); }

namespace lanes {
using Numbers = uint16_t __attribute__((vector_size(LANES * 4)));
template <class Sequence>
struct Twice;
template <int... I>
struct Twice<std::integer_sequence<int, I...>> {
  static INLINE Numbers joined(Halves a, Halves b) { return __builtin_shufflevector(a, b, I...); }
  // a0 b0 a1 b1 ... from the first (HALF = 0) or the second half of a and b
  template <int HALF>
  static INLINE Numbers alternating(Numbers a, Numbers b) {
    return __builtin_shufflevector(a, b, (HALF * LANES + I / 2 + (I & 1) * 2 * LANES)...);
  }
  // The numbers of a that are even (ODD = 0) or odd, then those of b.
  template <int ODD>
  static INLINE Numbers every_second(Numbers a, Numbers b) {
    return __builtin_shufflevector(a, b, (2 * I + ODD)...);
  }
  // a's first, b's first, a's next ... from a's halves
  static INLINE Numbers riffled(Numbers a) {
    return __builtin_shufflevector(a, a, (I / 2 + (I & 1) * LANES)...);
  }
  // Of the even numbers of two rows (row after row) and the odd ones: the pairs of both rows' first or second half.
  template <int HALF>
  static INLINE Numbers paired(Numbers evens, Numbers odds) {
    return __builtin_shufflevector(evens, odds, (HALF * LANES / 2 + I / 4 + (I & 1) * LANES + (I & 2) * LANES)...);
  }
};
using Both = Twice<std::make_integer_sequence<int, 2 * LANES>>;
}  // namespace lanes

// Two rows of 2 LANES numbers: the pairs of their first (HALF = 0) or second halves.
template <int HALF>
INLINE Words alternating(Words a, Words b) {
  return (Words)lanes::Both::alternating<HALF>((lanes::Numbers)a, (lanes::Numbers)b);
}
// a, then b, rounded: 2 LANES consecutive numbers.
INLINE Words consecutive(Vec a, Vec b) {
#if defined(__AVX512BF16__)
  return (Words)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
  return (Words)lanes::Both::joined(rounded(a), rounded(b));
#endif
}
// a and b, rounded: LANES pairs.
INLINE Words pairs_of(Vec a, Vec b) { return (Words)lanes::Both::riffled((lanes::Numbers)consecutive(a, b)); }

// Packing. `rows` and `columns` are those of `from`, multiples of 32.

// to [rows / 2][columns] = `from` in pairs.
INLINE void pair_rows(Pair* to, int64_t to_row, const bfloat16* from, int64_t from_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 2)
#pragma GCC unroll 4
    for (int64_t j = 0; j < columns; j += 2 * LANES) {
      Words a = load_pairs(from + i * from_row + j), b = load_pairs(from + (i + 1) * from_row + j);
      store_pairs(to + i / 2 * to_row + j, alternating<0>(a, b));
      store_pairs(to + i / 2 * to_row + j + LANES, alternating<1>(a, b));
    }
}
// The same of float32 numbers.
INLINE void pair_rows(Pair* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 2)
#pragma GCC unroll 4
    for (int64_t j = 0; j < columns; j += LANES) {
      Vec a = load(from + i * from_row + j), b = load(from + (i + 1) * from_row + j);
      store_pairs(to + i / 2 * to_row + j, pairs_of(a, b));
    }
}
// The same of rows multiplied by by[row].
INLINE void pair_scaled_rows(Pair* to, int64_t to_row, const bfloat16* from, int64_t from_row, int64_t rows,
                             int64_t columns, const float* by) {
  for (int64_t i = 0; i < rows; i += 2) {
    Vec by_a = broadcast(by[i]), by_b = broadcast(by[i + 1]);
#pragma GCC unroll 4
    for (int64_t j = 0; j < columns; j += 2 * LANES) {
      Words a = load_pairs(from + i * from_row + j), b = load_pairs(from + (i + 1) * from_row + j);
      auto evens = (lanes::Numbers)consecutive(firsts(a) * by_a, firsts(b) * by_b);
      auto odds = (lanes::Numbers)consecutive(seconds(a) * by_a, seconds(b) * by_b);
      store_pairs(to + i / 2 * to_row + j, (Words)lanes::Both::paired<0>(evens, odds));
      store_pairs(to + i / 2 * to_row + j + LANES, (Words)lanes::Both::paired<1>(evens, odds));
    }
  }
}
// to [rows][columns] = `from`, each row multiplied by by[row].
INLINE void scale_rows(bfloat16* to, int64_t to_row, const bfloat16* from, int64_t from_row, int64_t rows,
                       int64_t columns, const float* by) {
  for (int64_t i = 0; i < rows; i++) {
    Vec by_row = broadcast(by[i]);
#pragma GCC unroll 4
    for (int64_t j = 0; j < columns; j += 2 * LANES) {
      Words x = load_pairs(from + i * from_row + j);
      store_pairs(to + i * to_row + j, pairs_of(firsts(x) * by_row, seconds(x) * by_row));
    }
  }
}
// to [rows][columns] = `from`, rounded.
INLINE void round_rows(bfloat16* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows,
                       int64_t columns) {
  for (int64_t i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int64_t j = 0; j < columns; j += 2 * LANES) {
      Vec a = load(from + i * from_row + j), b = load(from + i * from_row + j + LANES);
      store_pairs(to + i * to_row + j, consecutive(a, b));
    }
}

// The transpose of a row-major matrix is one of pairs once 4-byte words have changed places, and the other way round.
namespace lanes {
template <class To, class From>
INLINE void transpose_words(To* to, int64_t to_row, const From* from, int64_t from_row, int64_t rows, int64_t words) {
  constexpr int64_t TO_WORD = 4 / sizeof(To), FROM_WORD = 4 / sizeof(From);
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < words; j += LANES) {
      Vec block[LANES];
#pragma GCC unroll 16
      for (int k = 0; k < LANES; k++) block[k] = (Vec)load_pairs(from + (i + k) * from_row + j * FROM_WORD);
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < LANES; k++) store_pairs(to + (j + k) * to_row + i * TO_WORD, (Words)block[k]);
    }
}
}  // namespace lanes
// to [columns / 2][rows] = the transpose of `from`, in pairs.
INLINE void transpose(Pair* to, int64_t to_row, const bfloat16* from, int64_t from_row, int64_t rows, int64_t columns) {
  lanes::transpose_words(to, to_row, from, from_row, rows, columns / 2);
}
// to [columns][rows] = the transpose of `from`, which is in pairs [rows / 2][columns].
INLINE void transpose(bfloat16* to, int64_t to_row, const Pair* from, int64_t from_row, int64_t rows, int64_t columns) {
  lanes::transpose_words(to, to_row, from, from_row, rows / 2, columns);
}
// to [rows][columns] = `from`, which is in pairs [rows / 2][columns]. After a transpose to pairs this is the row-major
// transpose.
INLINE void unpair_rows(bfloat16* to, int64_t to_row, const Pair* from, int64_t from_row, int64_t rows,
                        int64_t columns) {
  for (int64_t i = 0; i < rows; i += 2)
#pragma GCC unroll 4
    for (int64_t j = 0; j < columns; j += 2 * LANES) {
      auto a = (lanes::Numbers)load_pairs(from + i / 2 * from_row + j);
      auto b = (lanes::Numbers)load_pairs(from + i / 2 * from_row + j + LANES);
      store_pairs(to + i * to_row + j, (Words)lanes::Both::every_second<0>(a, b));
      store_pairs(to + (i + 1) * to_row + j, (Words)lanes::Both::every_second<1>(a, b));
    }
}
// The same with each column multiplied by by[column].
INLINE void unpair_scaled_columns(bfloat16* to, int64_t to_row, const Pair* from, int64_t from_row, int64_t rows,
                                  int64_t columns, const float* by) {
  for (int64_t j = 0; j < columns; j += 2 * LANES) {
    Vec by_a = load(by + j), by_b = load(by + j + LANES);
#pragma GCC unroll 4
    for (int64_t i = 0; i < rows; i += 2) {
      Words a = load_pairs(from + i / 2 * from_row + j), b = load_pairs(from + i / 2 * from_row + j + LANES);
      store_pairs(to + i * to_row + j, consecutive(firsts(a) * by_a, firsts(b) * by_b));
      store_pairs(to + (i + 1) * to_row + j, consecutive(seconds(a) * by_a, seconds(b) * by_b));
    }
  }
}

// A product: A[.., depth] row-major, B[depth, ..] in pairs.
struct Product {
  const bfloat16* a;
  int64_t a_row;
  const Pair* b;
  int64_t b_row, depth;
  INLINE Product from(int64_t i, int64_t j) const { return {a + i * a_row, a_row, b + j, b_row, depth}; }
};

#if defined(HAS_AMX)
// Defined where a test executes the tile instructions in software (tests/ops/native/amx_emulator.cpp).
extern "C" __attribute__((weak, visibility("default"))) int everlong_amx_emulated();

// Asks Linux, once in a process, to let it use the tiles (arch_prctl's ARCH_REQ_XCOMP_PERM for their data).
inline bool amx_allowed() {
  static const bool allowed =
      (everlong_amx_emulated && everlong_amx_emulated()) || syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
}
#endif

// Has to live in each thread while it multiplies: the tiles are configured with it, and given back.
class TileRegisters {
 public:
#if defined(HAS_AMX)
  TileRegisters() {
    if (!amx_allowed()) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    asm volatile("" : : "r"(&configuration) : "memory");  // GCC's intrinsic names too few of the bytes that it reads
    _tile_loadconfig(&configuration);
  }
  ~TileRegisters() {
    if (amx_allowed()) _tile_release();
  }
#else
  TileRegisters() {}
#endif
  TileRegisters(const TileRegisters&) = delete;
};

namespace leaf {

#if defined(HAS_AMX)
// ROWS, COLUMNS: 16 or 32. Tiles 0 to 3 are the sums, 4 and 5 of A, 6 and 7 of B.
template <int ROWS, int COLUMNS>
struct Amx {
  static INLINE void load(const float* from, int64_t row) {
    _tile_loadd(0, from, row * 4);
    if constexpr (COLUMNS == 32) _tile_loadd(1, from + 16, row * 4);
    if constexpr (ROWS == 32) _tile_loadd(2, from + 16 * row, row * 4);
    if constexpr (ROWS == 32 && COLUMNS == 32) _tile_loadd(3, from + 16 * row + 16, row * 4);
  }
  static INLINE void store(float* to, int64_t row) {
    _tile_stored(0, to, row * 4);
    if constexpr (COLUMNS == 32) _tile_stored(1, to + 16, row * 4);
    if constexpr (ROWS == 32) _tile_stored(2, to + 16 * row, row * 4);
    if constexpr (ROWS == 32 && COLUMNS == 32) _tile_stored(3, to + 16 * row + 16, row * 4);
  }
  static INLINE void clear() {
    _tile_zero(0);
    if constexpr (COLUMNS == 32) _tile_zero(1);
    if constexpr (ROWS == 32) _tile_zero(2);
    if constexpr (ROWS == 32 && COLUMNS == 32) _tile_zero(3);
  }
  static INLINE void add(const Product& x) {
    for (int64_t k = 0; k < x.depth; k += 32) {
      const bfloat16* a = x.a + k;
      const Pair* b = x.b + k / 2 * x.b_row;
      _tile_loadd(4, a, x.a_row * 2);
      _tile_loadd(6, b, x.b_row * 4);
      if constexpr (COLUMNS == 32) _tile_loadd(7, b + 16, x.b_row * 4);
      if constexpr (ROWS == 32) _tile_loadd(5, a + 16 * x.a_row, x.a_row * 2);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (COLUMNS == 32) _tile_dpbf16ps(1, 4, 7);
      if constexpr (ROWS == 32) _tile_dpbf16ps(2, 5, 6);
      if constexpr (ROWS == 32 && COLUMNS == 32) _tile_dpbf16ps(3, 5, 7);
    }
  }
  template <Into INTO, class... Products>
  static INLINE void multiply(float* c, int64_t c_row, const Products&... products) {
    asm volatile("" ::: "memory");  // GCC's intrinsics do not say that they read memory
    if constexpr (INTO == Into::result) {
      load(c, c_row);
    } else {
      clear();
    }
    (add(products), ...);
    store(c, c_row);
  }
};
#endif

// x[i] += the products of A's pairs with B's, in each lane.
INLINE Vec add_pairs(Vec x, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)x, (__m512bh)a, (__m512bh)b);
#else
  return firsts(a) * firsts(b) + x + seconds(a) * seconds(b);
#endif
}

template <int ROWS, int COLUMNS>
struct Vectors {
  static constexpr int VECTORS = COLUMNS / LANES;
  Tile<ROWS, VECTORS> sum;

  INLINE void add(const Product& x) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < x.depth; k += 2) {
      Words of_b[VECTORS];
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) of_b[j] = load_pairs(x.b + k / 2 * x.b_row + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        Pair pair;
        std::memcpy(&pair, x.a + i * x.a_row + k, sizeof pair);
        Words of_a = pair - Words{};
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; j++) sum.at[i][j] = add_pairs(sum.at[i][j], of_a, of_b[j]);
      }
    }
  }
  template <Into INTO, class... Products>
  static INLINE void multiply(float* c, int64_t c_row, const Products&... products) {
    Vectors here;
    if constexpr (INTO == Into::result) {
      here.sum.load(c, c_row);
    } else {
      here.sum.clear();
    }
    (here.add(products), ...);
    here.sum.store(c, c_row);
  }
};

// Calls visit.operator()<ROWS, COLUMNS>(i, j) for blocks that cover `rows` and `columns`, multiples of 16.
template <int ROWS, int COLUMNS, class Visit>
INLINE void for_blocks(int64_t rows, int64_t columns, Visit visit) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS) {
    int64_t j = 0;
    for (; j + COLUMNS <= columns; j += COLUMNS) visit.template operator()<ROWS, COLUMNS>(i, j);
    if constexpr (COLUMNS > 16) {
      if (j < columns) visit.template operator()<ROWS, 16>(i, j);
    }
  }
  if constexpr (ROWS > 16) {
    if (i < rows) for_blocks<16, COLUMNS>(16, columns, [&]<int, int WIDTH>(int64_t, int64_t j) {
      visit.template operator()<16, WIDTH>(i, j);
    });
  }
}

// Never inlined: it is long, and inside a longer function the sums lose their registers.
template <template <int, int> class Leaf, int ROWS, int COLUMNS, Into INTO, class... Products>
__attribute__((noinline)) void multiply(float* c, int64_t c_row, int64_t rows, int64_t columns,
                                        const Products&... products) {
  for_blocks<ROWS, COLUMNS>(rows, columns, [&]<int HEIGHT, int WIDTH>(int64_t i, int64_t j) {
    Leaf<HEIGHT, WIDTH>::template multiply<INTO>(c + i * c_row + j, c_row, products.from(i, j)...);
  });
}

// Enough sums to keep the multipliers busy, and no spills.
constexpr int ROWS = LANES == 16 ? 8 : 4, COLUMNS = LANES == 16 ? 32 : 16;

}  // namespace leaf

// C = the sum of the products, or C += it (Into::result); C's rows lie `c_row` apart. TileRegisters must live.
template <Into INTO = Into::nothing, class... Products>
INLINE void multiply(float* c, int64_t c_row, int64_t rows, int64_t columns, const Product& first,
                     const Products&... others) {
#if defined(HAS_AMX)
  if (amx_allowed()) return leaf::multiply<leaf::Amx, 32, 32, INTO>(c, c_row, rows, columns, first, others...);
#endif
  leaf::multiply<leaf::Vectors, leaf::ROWS, leaf::COLUMNS, INTO>(c, c_row, rows, columns, first, others...);
}

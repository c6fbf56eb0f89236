// A block of tokens of one head, as the operators with a low-rank correction work with it.
//
// Receivers read the state, sources write to it; a token has two receivers and one or two sources:
//
//   delta rule               receivers q, k    source k         u = beta (v - read)   read = what k reads
//   diagonal plus low rank   receivers q, a    sources b, k     u = read              read = what a reads
//
// The first source writes u, the second one v. Numbers of a block are float32 with channels padded by zeros to whole
// cache lines; tokens that are not there are zeros and do not fade anything.
#pragma once
#include "arguments.h"
#include "parallel.h"
#include "products.h"

#include <algorithm>

namespace low_rank {

// `LATE` receivers of the second kind read before the decay of their token, others after it.
template <int SOURCES_, bool LATE_>
struct Rule {
  static constexpr int SOURCES = SOURCES_;
  static constexpr bool LATE = LATE_;
};
using DeltaRule = Rule<1, false>;
using LowRankRule = Rule<2, true>;

constexpr int64_t LINE = 16;  // numbers

// Counts what `place` functions take, so that it can be had as one piece.
struct Counter {
  int64_t bytes = 0;
  template <class Number = float>
  Number* take(int64_t count) {
    bytes += round_up(count * int64_t(sizeof(Number)), LINE * 4);
    return nullptr;
  }
};

template <class RULE, class DECAY>
struct Block {
  static constexpr int SIZE = DECAY::SIZE, SOURCES = RULE::SOURCES;

  int64_t keys, values;      // channels with their padding
  float* receiver[2];        // [SIZE, keys]; the first is scaled
  float* source[SOURCES];    // [SIZE, keys]
  float* reach[2];           // [SIZE, keys]: receivers under the decay since the block's start
  float* store[SOURCES];     // [keys, SIZE]: sources under the decay until the block's end
  float* matrix[2][SOURCES]; // [SIZE, SIZE]: receivers times sources under the decay between them, where that is earlier
  float* total;              // [keys]: the decay of the whole block
  DECAY decay;
  float* beta;   // [SIZE]
  float* v;      // [SIZE, values]
  float* u;      // [SIZE, values]
  float* error;  // [SIZE, values]: v - read, where v stood
  float* state;  // [keys, values] before the block

  template <class Memory>
  void place(Memory& memory, int64_t keys_, int64_t values_) {
    keys = keys_, values = values_;
    for (float*& x : receiver) x = memory.take(SIZE * keys);
    for (float*& x : source) x = SOURCES == 1 ? receiver[1] : memory.take(SIZE * keys);
    for (float*& x : reach) x = memory.take(SIZE * keys);
    for (float*& x : store) x = memory.take(SIZE * keys);
    for (auto& row : matrix)
      for (float*& x : row) x = memory.take(SIZE * SIZE);
    total = memory.take(keys);
    decay.place(memory, keys);
    beta = memory.take(SIZE);
    v = memory.take(SIZE * values);
    u = memory.take(SIZE * values);
    error = v;
    state = memory.take(keys * values);
  }
};

// The gradients of a block's parts, before those of its tokens are made from them.
template <class RULE, class DECAY>
struct Gradients {
  static constexpr int SIZE = DECAY::SIZE, SOURCES = RULE::SOURCES;
  float* matrix[2][SOURCES];
  float* reach[2];         // [SIZE, keys]
  float* store[SOURCES];   // [SIZE, keys]
  float* total;            // [keys]: of the logarithm of `total`
  float* receiver[2];      // [SIZE, keys]
  float* source[SOURCES];  // [SIZE, keys]
  float* log_decay;        // [SIZE] or [SIZE, keys]

  template <class Memory>
  void place(Memory& memory, int64_t keys) {
    for (auto& row : matrix)
      for (float*& x : row) x = memory.take(SIZE * SIZE);
    for (float*& x : reach) x = memory.take(SIZE * keys);
    for (float*& x : store) x = memory.take(SIZE * keys);
    total = memory.take(keys);
    for (float*& x : receiver) x = memory.take(SIZE * keys);
    for (float*& x : source) x = memory.take(SIZE * keys);
    log_decay = memory.take(SIZE * keys);
  }
};

enum class Triangle { with_diagonal, strict };

// tile += L B for rows i .. of a lower triangular L[SIZE, SIZE]; what stands in its other half is not read.
template <Triangle PART, int ROWS, int VECTORS>
INLINE void add_lower(Tile<ROWS, VECTORS>& tile, const float* lower, int64_t size, int64_t i, const float* b,
                      int64_t row) {
  tile.add_product({lower + i * size, size, 1}, b, row, i);
  constexpr int SHIFT = PART == Triangle::strict;
#pragma GCC unroll 16
  for (int c = 0; c < ROWS - SHIFT; c++)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; j++) {
      Vec of_b = load(b + (i + c) * row + j * LANES);
#pragma GCC unroll 16
      for (int r = c + SHIFT; r < ROWS; r++) tile.at[r][j] += lower[(i + r) * size + i + c] * of_b;
    }
}

// tile += L^T B for rows i .. of L^T.
template <Triangle PART, int ROWS, int VECTORS>
INLINE void add_upper(Tile<ROWS, VECTORS>& tile, const float* lower, int64_t size, int64_t i, const float* b,
                      int64_t row) {
  constexpr int SHIFT = PART == Triangle::strict;
#pragma GCC unroll 16
  for (int c = SHIFT; c < ROWS; c++)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; j++) {
      Vec of_b = load(b + (i + c) * row + j * LANES);
#pragma GCC unroll 16
      for (int r = 0; r <= c - SHIFT; r++) tile.at[r][j] += lower[(i + c) * size + i + r] * of_b;
    }
  int64_t after = i + ROWS;
  if (after < size) tile.add_product({lower + after * size + i, 1, size}, b + after * row, row, size - after);
}

// lower[SIZE, SIZE] = A B^T where the column is not after the row, from A[SIZE, depth] and B transposed, [depth, SIZE].
template <int SIZE>
INLINE void multiply_lower(float* lower, const float* a, const float* b_transposed, int64_t depth) {
  auto visit = [&]<int ROWS, int VECTORS>(int64_t i, int64_t j) {
    Tile<ROWS, VECTORS> tile;
    tile.clear();
    tile.add_product({a + i * depth, depth, 1}, b_transposed + j, SIZE, depth);
    tile.store(lower + i * SIZE + j, SIZE);
  };
  for (int64_t i = 0; i < SIZE; i += 8) {
    int64_t columns = round_up(i + 8, LANES), j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) {
      visit.template operator()<4, 2>(i, j);
      visit.template operator()<4, 2>(i + 4, j);
    }
    if (j < columns) visit.template operator()<8, 1>(i, j);
  }
}

// A dot product, spread over the lanes.
INLINE Vec dots(const float* a, const float* b, int64_t count) {
  Vec total = zeros();
  for (int64_t i = 0; i < count; i += LANES) total += load(a + i) * load(b + i);
  return total;
}

}  // namespace low_rank

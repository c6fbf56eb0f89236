// Linear attention in blocks of 16 tokens: what its forward and its backward pass have in common.
//
//     S_t = e^{g_t} S_{t-1} + k_t v_t^T          o_t = q_t^T S_t, with a bonus u: q_t^T (S_{t-1} + diag(u) k_t v_t^T)
//
// Of a block, with S before it and `scale` in q:
//
//     o_i = reading_i^T S + sum_{j<=i} weights_ij v_j                S <- total S + sum_j writing_j v_j^T
//
// where reading, weights, writing and total are q, q k^T, k and 1 under the decays that lie between. Those are products
// of at most 16 factors, or the exponential of a sum; nothing is divided or subtracted, so -inf forgets exactly and a
// weak decay after a strong one keeps its digits. A block of 16 costs the fewest FLOPs: 4 K V a token for the state,
// where the pairs add 2 * 16 (K + V) at most. The normaliser is the memory of one more value, which is always 1.
#pragma once
#include "arguments.h"
#include "parallel.h"
#include "products.h"

#include <algorithm>

constexpr int BLOCK = 16;               // tokens
constexpr int VECTORS = BLOCK / LANES;  // of a row of the block's pairs
constexpr int VISIT = 64;               // tokens of one head before the next head's turn: neighbours in memory
constexpr int GROUP = 128;              // tokens from one saved state to the next
constexpr int TEAM = 8;                 // heads that take turns: their states stay in the cache
constexpr int64_t LARGE = 1 << 22;      // bytes of a result that the cache would not keep

enum class Decay : int64_t { none, token, channel };

struct Inputs {
  Tensor q, k, v;     // [B, T, h, K] twice, [B, T, H, V]; neighbouring channels lie side by side
  Tensor log_decay;   // [B, T, H] or [B, T, H, K]
  Tensor bonus;       // [H, K]
  Tensor cu_seqlens;  // [N + 1]
  int64_t sequences, length, heads, key_heads, keys, values;
  Decay decay;
  int64_t normalize;
  double scale;
  int64_t threads;

  int64_t key_head(int64_t head) const { return head / (heads / key_heads); }
  Sequence sequence(int64_t n) const { return sequence_of(cu_seqlens, n, length); }
  bool large() const { return (cu_seqlens ? 1 : sequences) * length * heads * values * 4 >= LARGE; }
  // Where the state before the group of tokens that begins with token t of sequence n is saved.
  int64_t slot(int64_t n, const Sequence& s, int64_t t) const {
    return (s.row * length + s.start) / GROUP + n + (t - s.start) / GROUP;
  }
};

// Heads of one sequence, with some columns of their values, which one thread computes.
struct Team {
  int64_t n, head, heads, first, columns;
};

// run(team) for all heads. Where there are fewer than threads, the columns of a head are shared out: they do not meet.
template <class Run>
void for_teams(const Inputs& in, Run run) {
  int64_t units = in.sequences * in.heads;
  if (units == 0) return;
  int64_t pieces = (in.threads + units - 1) / units;
  int64_t width = round_up((in.values + pieces - 1) / pieces, LANES);
  pieces = width ? (in.values + width - 1) / width : 1;
  parallel_ranges(units * pieces, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t row = begin / in.heads, head = begin % in.heads, first = row % pieces * width;
      int64_t heads = std::min({end - begin, in.heads - head, int64_t(TEAM)});
      run(Team{row / pieces, head, heads, first, std::min(width, in.values - first)});
      begin += heads;
    }
    end_streams();
  });
}

// The first `channels` numbers of `count` tokens, as float32 times `by`; zeros in the rest of `rows` of `width`.
INLINE void load_rows(float* to, int64_t width, const Tensor& from, int64_t offset, int64_t count, int64_t channels,
                      float by = 1, int64_t rows = BLOCK) {
  with_type(from, [&](auto number) {
    using Number = decltype(number);
    for (int64_t i = 0; i < count; i++) {
      const Number* row = static_cast<const Number*>(from.data) + offset + i * from.stride[1];
      int64_t d = 0;
      for (; d + LANES <= channels; d += LANES) store(to + i * width + d, load(row + d) * by);
      for (; d < width; d += LANES)
        store(to + i * width + d, d < channels ? load_some(row + d, channels - d) * by : zeros());
    }
  });
  for (int64_t i = count * width; i < rows * width; i += LANES) store(to + i, zeros());
}

// The other way; results larger than LARGE go past the cache.
INLINE void store_rows(const Tensor& to, int64_t offset, const float* from, int64_t width, int64_t count,
                       int64_t channels, bool large, float by = 1) {
  with_type(to, [&](auto number) {
    using Number = decltype(number);
    Number* first = static_cast<Number*>(to.data) + offset;
    constexpr int64_t ALIGNED = LANES * sizeof(Number);
    bool streams = large && reinterpret_cast<uintptr_t>(first) % ALIGNED == 0 && to.stride[1] % LANES == 0;
    for (int64_t i = 0; i < count; i++) {
      Number* row = first + i * to.stride[1];
      int64_t d = 0;
      for (; d + LANES <= channels; d += LANES) {
        Vec x = load(from + i * width + d) * by;
        if constexpr (sizeof(Number) == 4) {
          streams ? stream(row + d, x) : store(row + d, x);
        } else {
          store(row + d, x);
        }
      }
      if (d < channels) store_some(row + d, load(from + i * width + d) * by, channels - d);
    }
  });
}

// sum_d a_d b_d c_d
INLINE float dot(const float* a, const float* b, const float* c, int64_t count) {
  Vec products = zeros();
  for (int64_t d = 0; d < count; d += LANES) products += load(a + d) * load(b + d) * load(c + d);
  return sum(products);
}

// C = A B or C += A B with rows that are one block of tokens wide: as many of them in registers as fit.
constexpr int TALL = VECTORS == 1 ? 16 : 4;
template <class Visit>
INLINE void for_tall_tiles(int64_t rows, Visit visit) {
  for (int64_t i = 0; i < rows; i += TALL) visit.template operator()<TALL, VECTORS>(i);
}

// += A B where row i of A ends with column diagonal + i: what comes after may be infinite, where 0 would not hide it.
template <int ROWS, int WIDTH>
INLINE void add_triangle(Tile<ROWS, WIDTH>& tile, Matrix a, const float* b, int64_t row, int64_t diagonal) {
  tile.add_product(a, b, row, diagonal);
#pragma GCC unroll 16
  for (int k = 0; k < ROWS; k++)
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; j++) {
      Vec of_b = load(b + (diagonal + k) * row + j * LANES);
#pragma GCC unroll 16
      for (int i = k; i < ROWS; i++) tile.at[i][j] += of_b * a.data[i * a.row + (diagonal + k) * a.column];
    }
}

// Asks for rows of tokens that come next, a few at a time between products: heads stand apart in memory, in strides
// that the processor does not foresee.
class Ahead {
  struct Rows {
    const char* from;
    int64_t stride, bytes;
  } tensors[5];
  int count = 0;
  int64_t row = 0, rows;

 public:
  explicit Ahead(int64_t tokens) : rows(tokens) {}
  void add(const Tensor& x, int64_t n, int64_t t, int64_t head, int64_t first, int64_t channels) {
    int64_t size = x.type == Type::bfloat16 ? 2 : 4;
    const char* from = static_cast<const char*>(x.data) + size * x.offset(n, t, head, first);
    tensors[count++] = {from, size * x.stride[1], size * channels};
  }
  INLINE void next_row() {
    if (row >= rows) return;
    for (int i = 0; i < count; i++) {
      const char* from = tensors[i].from + row * tensors[i].stride;
      for (int64_t at = 0; at < tensors[i].bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
    row++;
  }
};

// e^x = keep + change with keep 0 or 1: a state under a weak decay for a million tokens keeps its digits if the change
// alone is rounded.
struct Growth {
  Vec keep, change;
  explicit INLINE Growth(Vec x) {
    Ints near = x * x < 0.1f;
    Vec p = x * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    keep = select(near, broadcast(1.0f), zeros());
    change = select(near, p * (x * x) + x, exp(x));
  }
};

INLINE Vec grown(Vec x, Vec more, Vec keep, Vec change) { return x * keep + (x * change + more); }

// BLOCK tokens of one head in float32.
struct Block {
  const Inputs& in;
  int64_t keys, values;          // rounded up; one more value than columns where the output is normalised
  int64_t count = 0;             // of real tokens; the others are zeros and do not decay
  float *q, *k, *v;              // [BLOCK, keys] twice, [BLOCK, values]
  float* k_across;               // [keys, BLOCK]
  float *reading, *writing;      // [BLOCK, keys]
  float *weights, *between;      // [BLOCK, BLOCK]: zero where j > i; the decays of tokens in them
  float *keep, *change;          // [keys]: their sum is the block's decay
  float *factor, *reach, *rest;  // e^g, and its products up to and after each token: [BLOCK] or [BLOCK, keys]
  float* asked;                  // [BLOCK, keys]: q under its own token's decay, or as it is with a bonus
  float* bonus;                  // [keys]: ones without

  static int64_t bytes(int64_t keys, int64_t values) {
    return 4 * (BLOCK * (9 * keys + values + 2 * BLOCK) + 3 * keys) + 1024;
  }

  Block(const Inputs& inputs, int64_t columns, Scratch& scratch)
      : in(inputs), keys(round_up(in.keys, BLOCK)), values(round_up(columns + in.normalize, BLOCK)) {
    int64_t size = BLOCK * keys, factors = in.decay == Decay::channel ? size : BLOCK;
    q = scratch.take(size);
    k = scratch.take(size);
    v = scratch.take(BLOCK * values);
    k_across = scratch.take(size);
    reading = in.decay == Decay::none ? q : scratch.take(size);
    writing = in.decay == Decay::none ? k : scratch.take(size);
    asked = in.decay == Decay::channel && !in.bonus ? scratch.take(size) : q;
    weights = scratch.take(BLOCK * BLOCK);
    between = scratch.take(BLOCK * BLOCK);
    keep = scratch.take(keys);
    change = scratch.take(keys);
    bonus = scratch.take(keys);
    factor = scratch.take(factors);
    reach = scratch.take(factors);
    rest = scratch.take(factors);
    std::fill(bonus, bonus + keys, 1.0f);
    std::fill(keep, keep + keys, 1.0f);
    std::fill(change, change + keys, 0.0f);
  }

  void use_head(int64_t head) {
    if (in.bonus) read(bonus, in.bonus, head * in.bonus.stride[0], in.keys, 1);
  }

  // k, v, and what is written: all that the state needs.
  void load_written(const Sequence& s, const Team& team, int64_t head, int64_t t) {
    count = std::min<int64_t>(BLOCK, s.stop - t);
    load_rows(k, keys, in.k, in.k.offset(s.row, t, in.key_head(head)), count, in.keys);
    load_rows(v, values, in.v, in.v.offset(s.row, t, head, team.first), count, team.columns);
    if (in.normalize)
      for (int64_t i = 0; i < count; i++) v[i * values + team.columns] = 1;
    if (in.decay == Decay::token) decay_tokens(s, head, t);
    if (in.decay == Decay::channel) decay_channels(s, head, t);
  }

  void ask_written(Ahead& ahead, const Sequence& s, const Team& team, int64_t head, int64_t t) const {
    ahead.add(in.k, s.row, t, in.key_head(head), 0, in.keys);
    ahead.add(in.v, s.row, t, head, team.first, team.columns);
    if (in.decay == Decay::channel) ahead.add(in.log_decay, s.row, t, head, 0, in.keys);
  }

  // q, and what it reads of the state.
  void load_reading(const Sequence& s, int64_t head, int64_t t) {
    load_rows(q, keys, in.q, in.q.offset(s.row, t, in.key_head(head)), count, in.keys, float(in.scale));
    if (in.decay == Decay::token)
      for (int i = 0; i < BLOCK; i++)
        for (int64_t d = 0; d < keys; d += LANES) store(reading + i * keys + d, load(q + i * keys + d) * reach[i]);
    if (in.decay == Decay::channel)
      for (int64_t i = 0; i < BLOCK * keys; i += LANES) {
        if (!in.bonus) store(asked + i, load(q + i) * load(factor + i));
        store(reading + i, load(asked + i) * load(reach + i));
      }
  }

  // The weights of the block's own tokens for each other.
  void weigh() {
    transpose(k_across, BLOCK, k, keys, BLOCK, keys);
    if (in.decay == Decay::channel) {
      weigh_channels();
    } else {
      weigh_tokens();
    }
    if (in.bonus || in.decay == Decay::channel)
      for (int i = 0; i < BLOCK; i++) weights[i * BLOCK + i] = dot(q + i * keys, bonus, k + i * keys, keys);
  }

 private:
  void decay_tokens(const Sequence& s, int64_t head, int64_t t) {
    float g[BLOCK] = {}, up_to[BLOCK], after[BLOCK], total = 0, left = 0;
    read(g, in.log_decay, in.log_decay.offset(s.row, t, head), count, in.log_decay.stride[1]);
    for (int i = 0; i < BLOCK; i++) {
      up_to[i] = in.bonus ? total : total + g[i];
      total += g[i];
    }
    for (int i = BLOCK - 1; i >= 0; i--) {
      after[i] = left;
      left += g[i];
    }
    for (int i = 0; i < BLOCK; i += LANES) {
      store(factor + i, exp(load(g + i)));
      store(reach + i, exp(load(up_to + i)));
      store(rest + i, exp(load(after + i)));
    }
    Growth growth(broadcast(total));
    for (int64_t d = 0; d < keys; d += LANES) {
      store(keep + d, growth.keep);
      store(change + d, growth.change);
      for (int i = 0; i < BLOCK; i++) store(writing + i * keys + d, load(k + i * keys + d) * rest[i]);
    }
  }

  void decay_channels(const Sequence& s, int64_t head, int64_t t) {
    load_rows(factor, keys, in.log_decay, in.log_decay.offset(s.row, t, head), count, in.keys);
    for (int64_t d = 0; d < keys; d += LANES) {
      Vec total = zeros(), up_to = broadcast(1), after = broadcast(1);
      for (int64_t i = d; i < BLOCK * keys; i += keys) {
        Vec g = load(factor + i), a = exp(g);
        total += g;
        store(factor + i, a);
        store(reach + i, up_to);  // before the token's own decay: `asked` has that
        up_to *= a;
      }
      for (int64_t i = (BLOCK - 1) * keys + d; i >= 0; i -= keys) {
        store(rest + i, after);
        store(writing + i, load(k + i) * after);
        after *= load(factor + i);
      }
      Growth growth(total);
      store(keep + d, growth.keep);
      store(change + d, growth.change);
    }
  }

  // weights_ij = q_i^T k_j prod_{j<s<=i} e^{g_s}, up to s < i with a bonus
  void weigh_tokens() {
    bool decays = in.decay == Decay::token, early = bool(in.bonus);
    Vec decay[VECTORS];
    for (int n = 0; n < VECTORS; n++) decay[n] = broadcast(1);
    for_tall_tiles(BLOCK, [&]<int ROWS, int WIDTH>(int64_t first) {
      Tile<ROWS, WIDTH> tile;
      tile.clear();
      tile.add_product({q + first * keys, keys, 1}, k_across, BLOCK, keys);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int n = 0; n < WIDTH; n++) {
          int i = int(first) + r;
          Ints source = lane_numbers() + n * LANES;
          Vec weight = tile.at[r][n];
          if (decays) {
            Vec later = select(source < i, decay[n] * factor[i], decay[n]), now = early ? decay[n] : later;
            weight *= now;
            store(between + i * BLOCK + n * LANES, now);
            decay[n] = later;
          }
          store(weights + i * BLOCK + n * LANES, select(source <= i, weight, zeros()));
        }
    });
  }

  // weights_ij = sum_d asked_id k_jd prod_{j<s<i} e^{g_sd}: the keys of all tokens decay while i moves on
  void weigh_channels() {
    for (int j = 0; j < BLOCK; j += LANES) {
      Ints source = lane_numbers() + j;
      Vec sums[BLOCK] = {};
      for (int64_t d = 0; d < keys; d++) {
        Vec key = load(k_across + d * BLOCK + j);
#pragma GCC unroll 16
        for (int i = 1; i < BLOCK; i++) {
          if (i > 1) key = select(source < i - 1, key * factor[(i - 1) * keys + d], key);
          sums[i] += asked[i * keys + d] * key;
        }
      }
      for (int i = 0; i < BLOCK; i++) store(weights + i * BLOCK + j, select(source < i, sums[i], zeros()));
    }
  }
};

// A head's state in scratch [keys, values], the sum of keys in the column after the last, and its places outside.
INLINE void load_state(float* to, const Block& block, const Tensor& state, const Tensor& total, const Team& team,
                       int64_t n, int64_t head) {
  const Inputs& in = block.in;
  std::fill(to, to + block.keys * block.values, 0.0f);
  for (int64_t d = 0; d < in.keys; d++) {
    float* row = to + d * block.values;
    if (state) read(row, state, state.offset(n, head, d, team.first), team.columns, 1);
    if (in.normalize && total) row[team.columns] = *total.at<float>(n, head, d);
  }
}
INLINE void store_state(const Tensor& state, const Tensor& total, const float* from, const Block& block,
                        const Team& team, int64_t n, int64_t head) {
  const Inputs& in = block.in;
  for (int64_t d = 0; d < in.keys; d++) {
    const float* row = from + d * block.values;
    write(state, state.offset(n, head, d, team.first), row, team.columns, 1);
    if (in.normalize && team.first == 0) *total.at<float>(n, head, d) = row[team.columns];
  }
}

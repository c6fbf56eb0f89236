// Linear attention in bfloat16, forward: products of bfloat16 numbers, sums and states in float32.
//
// A chunk's outputs are one product, its state another (see linear_attention_bf16.h):
//
//     P = (Q K^T) * between, lower triangle        O = scale * [reach Q | P] [S ; V]        S = total S + (store K)^T V
#include "linear_attention_bf16.h"

namespace linear_attention_bf16 {
namespace {

struct Forward {
  Tensor q, k, v, log_decay, state, cu_seqlens;  // [B, T, h, K] twice, [B, T, H, V], [B, T, H], [N, H, K, V], [N + 1]
  Tensor o, last, saved;                         // [B, T, H, V], [N, H, K, V], [groups, H, wide K, wide V] or none
  int64_t sequences, length, heads, keys, values, sharing;  // sharing: heads of v for one of q and k
  int64_t slots, few;  // places for groups in `saved`; whether there are fewer sequences and heads than threads
  double scale;
};

struct Memory {
  bfloat16 *q, *k, *v;       // copies of tokens at an end
  float *gates, *between;    // [C], [C][C]
  float *reach, *store;      // [C]
  float* sound;              // [V]: tokens before the first infinite value of a channel
  Pair *keys;                // K^T in pairs: [K / 2][C]
  bfloat16 *stored_keys;     // (store K)^T: [K][C]
  bfloat16 *reached_queries;  // reach Q: [C][K]
  Pair *values, *state_pairs;  // V and S in pairs: [C / 2][V], [K / 2][V]
  bfloat16 *weights;         // P: [C][C]
  float *block, *states;     // [BLOCK][BLOCK], [HEADS][K][V]

  template <class From>
  Memory(From& from, int64_t wide_keys, int64_t wide_values)
      : q(from.template take<bfloat16>(CHUNK * wide_keys)),
        k(from.template take<bfloat16>(CHUNK * wide_keys)),
        v(from.template take<bfloat16>(CHUNK * wide_values)),
        gates(from.take(CHUNK)),
        between(from.take(CHUNK * CHUNK)),
        reach(from.take(CHUNK)),
        store(from.take(CHUNK)),
        sound(from.take(wide_values)),
        keys(from.template take<Pair>(wide_keys / 2 * CHUNK)),
        stored_keys(from.template take<bfloat16>(wide_keys * CHUNK)),
        reached_queries(from.template take<bfloat16>(CHUNK * wide_keys)),
        values(from.template take<Pair>(CHUNK / 2 * wide_values)),
        state_pairs(from.template take<Pair>(wide_keys / 2 * wide_values)),
        weights(from.template take<bfloat16>(CHUNK * CHUNK)),
        block(from.take(BLOCK * BLOCK)),
        states(from.take(HEADS * wide_keys * wide_values)) {}
};

// The decays of a chunk of `rows` tokens; returns the total. Products run inside blocks of LANES tokens, whose chains
// the processor computes side by side, and join those of whole blocks.
INLINE float decays(const Memory& m, int64_t rows) {
  Vec to_end[CHUNK / LANES] = {};  // of each source of a block
  for (int64_t i = 0; i < LANES; i++)
#pragma GCC unroll 4
    for (int64_t block = 0; block < rows; block += LANES) {
      Vec& row = to_end[block / LANES];
      row = select(lane_numbers() == int32_t(i), broadcast(1.0f), row * m.gates[block + i]);
      store(m.between + (block + i) * CHUNK + block, row);
    }
  // visit(i, from the end of the block before `first` to i); returns what reaches the chunk's end
  auto later = [&](int64_t first, auto visit) {
    float passed = 1.0f;
    for (int64_t block = first; block < rows; block += LANES) {
      passed *= m.gates[block];
      for (int64_t i = block; i < block + LANES; i++) visit(i, passed * m.between[i * CHUNK + block]);
      passed *= m.between[(block + LANES - 1) * CHUNK + block];
    }
    return passed;
  };
  for (int64_t block = 0; block < rows; block += LANES) {
    Vec source = to_end[block / LANES];
    float rest = later(block + LANES, [&](int64_t i, float by) { store(m.between + i * CHUNK + block, source * by); });
    store(m.store + block, source * rest);
  }
  return later(0, [&](int64_t i, float by) { m.reach[i] = by; });
}

// S in pairs for the products, and S = total S.
template <bool DECAYS>
INLINE void pair_state(Pair* pairs, float* state, float total, int64_t keys, int64_t values) {
  for (int64_t d = 0; d < keys; d += 2)
#pragma GCC unroll 4
    for (int64_t c = 0; c < values; c += LANES) {
      float *even = state + d * values + c, *odd = even + values;
      Vec a = load(even), b = load(odd);
      store_pairs(pairs + d / 2 * values + c, pairs_of(a, b));
      if constexpr (DECAYS) {
        store(even, a * total);
        store(odd, b * total);
      }
    }
}

// P's block from Q K^T: the products of tokens i (from `row` on) and j (from `column` on), if j <= i.
template <bool DECAYS>
INLINE void weigh(const Memory& m, int64_t row, int64_t column) {
  for (int64_t i = row; i < row + BLOCK; i++)
#pragma GCC unroll 4
    for (int64_t j = column; j < column + BLOCK; j += 2 * LANES) {
      Vec x[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        int64_t from = j + half * LANES;
        x[half] = load(m.block + (i - row) * BLOCK + from - column);
        if constexpr (DECAYS) x[half] *= load(m.between + i * CHUNK + from);
        if (row == column) x[half] = select(lane_numbers() + int32_t(from) > int32_t(i), zeros(), x[half]);
      }
      store_pairs(m.weights + i * CHUNK + j, consecutive(x[0], x[1]));
    }
}

// One chunk of one head.
template <bool DECAYS>
class Chunk {
  const Forward& x;
  const Memory& m;
  Span at;
  int64_t head;
  Channels keys, values;
  Ahead& ahead;
  Rows q{};  // reach Q, once the weights are made

  // visit(t, c, block) with each block of [reach Q | P] [S ; V]
  template <class Visit>
  INLINE void outputs(Visit visit) const {
    for (int64_t t = 0; t < at.rows(); t += BLOCK)
      for (int64_t c = 0; c < values.wide; c += BLOCK) {
        Product past{q.data + t * q.row, q.row, m.state_pairs + c, values.wide, keys.wide};
        Product near{m.weights + t * CHUNK, CHUNK, m.values + c, values.wide, t + BLOCK};
        multiply(m.block, BLOCK, BLOCK, BLOCK, past, near);
        ahead.fetch();
        visit(t, c);
      }
  }

 public:
  Chunk(const Forward& x, const Memory& m, Span at, int64_t head, Ahead& ahead)
      : x(x), m(m), at(at), head(head), keys(x.keys), values(x.values), ahead(ahead) {}

  INLINE void run(float* state) {
    int64_t rows = at.rows();
    float total = 1.0f;
    if constexpr (DECAYS) {
      read_gates(m.gates, x.log_decay, at, head);
      total = decays(m, rows);
    }
    q = rows_of(x.q, at, head / x.sharing, keys, m.q);
    Rows k = rows_of(x.k, at, head / x.sharing, keys, m.k), v = rows_of(x.v, at, head, values, m.v);
    transpose(m.keys, CHUNK, k.data, k.row, rows, keys.wide);
    pair_rows(m.values, values.wide, v.data, v.row, rows, values.wide);
    pair_state<DECAYS>(m.state_pairs, state, total, keys.wide, values.wide);
    for (int64_t i = 0; i < rows; i += BLOCK)
      for (int64_t j = 0; j <= i; j += BLOCK) {
        multiply(m.block, BLOCK, BLOCK, BLOCK, Product{q.data + i * q.row, q.row, m.keys + j, CHUNK, keys.wide});
        ahead.fetch();
        weigh<DECAYS>(m, i, j);
      }
    if constexpr (DECAYS) {
      scale_rows(m.reached_queries, keys.wide, q.data, q.row, rows, keys.wide, m.reach);
      q = {m.reached_queries, keys.wide};
      unpair_scaled_columns(m.stored_keys, CHUNK, m.keys, CHUNK, keys.wide, rows, m.store);
    } else {
      unpair_rows(m.stored_keys, CHUNK, m.keys, CHUNK, keys.wide, rows);
    }
    outputs([&](int64_t t, int64_t c) { write_block(x.o, at, head, values, t, c, m.block, float(x.scale)); });
    Product update{m.stored_keys, CHUNK, m.values, values.wide, rows};
    for (int64_t d = 0; d < keys.wide; d += BLOCK, ahead.fetch())
      multiply<Into::result>(state + d * values.wide, values.wide, BLOCK, values.wide, update.from(d, 0));
    // An infinite value of a token makes its column infinite in every row of the state, or NaN.
    Vec unsound = zeros();
    for (int64_t c = 0; c < values.wide; c += LANES) unsound += load(state + c) * 0.0f;
    if (!(sum(unsound) == 0.0f)) confine(v);
  }

  // The weight 0 of a later token times its infinite value is NaN. So here the outputs before the first such value of a
  // channel are made without it: bit for bit as if it were any other.
  __attribute__((noinline)) void confine(Rows v) {
    for (int64_t c = 0; c < values.wide; c += LANES) {
      Ints unsound = lane_numbers() < 0;
      Vec before = zeros();
      for (int64_t t = 0; t < at.rows(); t++) {
        Vec value = load(v.data + t * v.row + c);
        unsound |= value * 0.0f != 0.0f;
        before += select(unsound, zeros(), broadcast(1.0f));
        store(m.v + t * values.wide + c, select(unsound, zeros(), value));
      }
      store(m.sound + c, before);
    }
    pair_rows(m.values, values.wide, m.v, values.wide, at.rows(), values.wide);
    outputs([&](int64_t t, int64_t c) {
      for (int64_t i = 0; i < std::min(BLOCK, at.count - t); i++)
        for (int64_t j = 0; j < std::min(BLOCK, values.count - c); j++)
          if (float(t + i) < m.sound[c + j])
            narrow(m.block[i * BLOCK + j] * float(x.scale), x.o.at<bfloat16>(at.row, at.first + t + i, head, c + j));
    });
  }
};

template <bool DECAYS>
void run_chunk(const Forward& x, const Work<Memory>& work, Sequence s, int64_t t, int64_t head, float* state) {
  Span next{s.row, t + CHUNK, std::min(CHUNK, s.stop - t - CHUNK)};
  Ahead ahead(next.count, 3 + work.values.wide / BLOCK * 2 + work.keys.wide / BLOCK);
  ahead.add(x.q, next, head / x.sharing, work.keys);
  ahead.add(x.k, next, head / x.sharing, work.keys);
  ahead.add(x.v, next, head, work.values);
  Chunk<DECAYS>(x, work.memory, {s.row, t, std::min(CHUNK, s.stop - t)}, head, ahead).run(state);
}

template <bool DECAYS>
void run_heads(const Forward& x, int64_t n, int64_t head, int64_t count) {
  Work<Memory> work(x.keys, x.values);
  float* states = work.memory.states;
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  int64_t size = work.size(), group = groups_of(x.cu_seqlens, n, x.length, s).first;
  for (int64_t h = 0; h < count; h++) read_state(states + h * size, x.state, n, head + h, work.keys, work.values);
  for (int64_t t = s.start; t < s.stop; t += CHUNK)
    for (int64_t h = 0; h < count; h++) {
      float* state = states + h * size;
      if (x.saved && (t - s.start) % GROUP == 0)
        std::memcpy(x.saved.at<float>(group + (t - s.start) / GROUP, head + h), state, size * sizeof *state);
      run_chunk<DECAYS>(x, work, s, t, head + h, state);
    }
  for (int64_t h = 0; h < count; h++) write_state(x.last, n, head + h, states + h * size, work.keys, work.values);
}

// Saves the states before the groups, BLOCK of their columns: what is done for them alone, as it is done above.
template <bool DECAYS>
void run_states(const Forward& x, int64_t n, int64_t head, int64_t first_value) {
  Work<Memory> work(x.keys, x.values);
  const Memory& m = work.memory;
  Channels keys = work.keys, values = work.values;
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  int64_t group = groups_of(x.cu_seqlens, n, x.length, s).first;
  float *whole = m.states, *state = whole + keys.wide * values.wide;
  read_state(whole, x.state, n, head, keys, values);
  if (s.start == s.stop && first_value == 0) write_state(x.last, n, head, whole, keys, values);
  for (int64_t d = 0; d < keys.wide; d++)
    std::memcpy(state + d * BLOCK, whole + d * values.wide + first_value, BLOCK * sizeof *state);
  for (int64_t t = s.start; t < s.stop; t += CHUNK) {
    if ((t - s.start) % GROUP == 0) {
      float* saved = x.saved.at<float>(group + (t - s.start) / GROUP, head) + first_value;
      for (int64_t d = 0; d < keys.wide; d++)
        std::memcpy(saved + d * values.wide, state + d * BLOCK, BLOCK * sizeof *state);
    }
    if (t + CHUNK >= s.stop) break;
    Span at{s.row, t, CHUNK};
    Rows k = rows_of(x.k, at, head / x.sharing, keys, m.k), v = rows_of(x.v, at, head, values, m.v);
    transpose(m.keys, CHUNK, k.data, k.row, CHUNK, keys.wide);
    pair_rows(m.values, BLOCK, v.data + first_value, v.row, CHUNK, BLOCK);
    if constexpr (DECAYS) {
      read_gates(m.gates, x.log_decay, at, head);
      float total = decays(m, CHUNK);
      for (int64_t i = 0; i < keys.wide * BLOCK; i += LANES) store(state + i, load(state + i) * total);
      unpair_scaled_columns(m.stored_keys, CHUNK, m.keys, CHUNK, keys.wide, CHUNK, m.store);
    } else {
      unpair_rows(m.stored_keys, CHUNK, m.keys, CHUNK, keys.wide, CHUNK);
    }
    multiply<Into::result>(state, BLOCK, keys.wide, BLOCK, Product{m.stored_keys, CHUNK, m.values, BLOCK, CHUNK});
  }
}

template <bool DECAYS>
void run_group(const Forward& x, int64_t n, Sequence s, int64_t first, int64_t slot, int64_t head) {
  Work<Memory> work(x.keys, x.values);
  float* state = work.memory.states;
  int64_t stop = std::min(first + GROUP, s.stop);
  std::memcpy(state, x.saved.at<float>(slot, head), work.size() * sizeof *state);
  for (int64_t t = first; t < stop; t += CHUNK) run_chunk<DECAYS>(x, work, s, t, head, state);
  if (stop == s.stop) write_state(x.last, n, head, state, work.keys, work.values);
}

// Few sequences and heads: first the states before the groups, by blocks of values, then the groups side by side.
template <bool DECAYS>
void run(const Forward& x) {
  if (!x.few)
    return for_heads(x.sequences, x.heads,
                     [&](int64_t n, int64_t head, int64_t count) { run_heads<DECAYS>(x, n, head, count); });
  for_blocks_of_values(x.sequences, x.heads, Channels(x.values),
                       [&](int64_t n, int64_t head, int64_t value) { run_states<DECAYS>(x, n, head, value); });
  for_groups(x.cu_seqlens, x.sequences, x.length, x.slots, x.heads,
             [&](int64_t n, Sequence s, int64_t first, int64_t slot, int64_t head) {
               run_group<DECAYS>(x, n, s, first, slot, head);
             });
}

}  // namespace
}  // namespace linear_attention_bf16

KERNEL(linear_attention_bf16_forward, linear_attention_bf16::Forward) {
  using namespace linear_attention_bf16;
  arguments.log_decay ? run<true>(arguments) : run<false>(arguments);
}

// The delta rule and diagonal plus low rank, block by block. See ops/delta.py for the recurrences.
//
// In a block the reads of its tokens are one triangular system, into which the state S before the block enters on the right
// (matrices and vectors as in blocks.h, 0 and 1 counting receivers and sources):
//
//   read = M_10 u + M_11 v + reach_1 S           u = beta (v - read), no second source     or     u = read
//   o    = M_00 u + M_01 v + reach_0 S           S' = total S + store_0 u + store_1 v
//
// Backwards, with x the gradient of u, z that of read, G that of o and D that of S' (primes of M mean transposed):
//
//   x = M_00' G + M_10' z + store_0' D           z = -beta x, dv = -z, dbeta = x (v - read)     or     z = x
//   dS = total D + reach_0' G + reach_1' z       dv = M_01' G + M_11' z + store_1' D
//   dM_0s = G values_s'   dM_1s = z values_s'    dreach_0 = G S'   dreach_1 = z S'   dstore_s = values_s D'
//
// States are kept every `group` tokens; the backward pass makes the blocks of a group again from there.
#pragma once
#include "decayed.h"

struct LowRankInputs {
  Tensor q, k, v, beta, a, b, log_decay;  // [B, T, heads, channels]; without channels beta and the decay of tokens
  Tensor cu_seqlens;
  int64_t sequences, length, heads, key_heads, a_heads, b_heads, keys, values, by_channel, group;
  double scale;

  // The head of x that a head of v uses.
  int64_t shared(int64_t head, int64_t heads_of_x) const { return head / (heads / heads_of_x); }
  int64_t padded_keys() const { return round_up(keys, LINE); }
  int64_t padded_values() const { return round_up(values, LINE); }
  // Where the states of a sequence stand among those kept: an upper bound of the groups before them.
  int64_t first_group(const Sequence& s, int64_t n) const {
    return cu_seqlens ? s.start / group + n : n * std::max<int64_t>((length + group - 1) / group, 1);
  }
};

struct LowRankForward {
  LowRankInputs in;
  Tensor state, o, last, starts;  // [N, H, K, V], as v, [N, H, K, V], [groups, H, K, V]: none where not kept
};

struct LowRankBackward {
  LowRankInputs in;
  Tensor starts, d_o, d_last;
  Tensor d_q, d_k, d_v, d_beta, d_a, d_b, d_log_decay, d_state;  // d_q .. d_b for each head of v
};

// Tokens of one head of one sequence.
struct Place {
  int64_t row, start, count, head;
};

INLINE int64_t offset(const Tensor& x, const Place& at, int64_t head) {
  return at.row * x.stride[0] + at.start * x.stride[1] + head * x.stride[2];
}

// [size, width] as float32, zeros around what is there; `ahead` tokens later is what will be read next.
inline void read_rows(float* to, int64_t size, int64_t width, const Tensor& from, const Place& at, int64_t head,
                      int64_t channels) {
  for (int64_t i = 0; i < at.count; i++) {
    read(to + i * width, from, offset(from, at, head) + i * from.stride[1], channels, from.stride[3]);
    std::fill(to + i * width + channels, to + (i + 1) * width, 0.0f);
  }
  std::fill(to + at.count * width, to + size * width, 0.0f);
}

inline void write_rows(const Tensor& to, const Place& at, const float* from, int64_t width, int64_t channels) {
  for (int64_t i = 0; i < at.count; i++)
    write(to, offset(to, at, at.head) + i * to.stride[1], from + i * width, channels, to.stride[3]);
}

// One state of `[.., H, K, V]`; nothing given is zeros.
inline void read_state(float* to, const Tensor& from, int64_t n, int64_t head, const LowRankInputs& in) {
  const int64_t width = in.padded_values();
  std::fill(to, to + in.padded_keys() * width, 0.0f);
  if (from)
    for (int64_t d = 0; d < in.keys; d++)
      read(to + d * width, from, n * from.stride[0] + head * from.stride[1] + d * from.stride[2], in.values,
           from.stride[3]);
}

inline void write_state(const Tensor& to, int64_t n, int64_t head, const float* from, const LowRankInputs& in) {
  for (int64_t d = 0; d < in.keys; d++)
    write(to, n * to.stride[0] + head * to.stride[1] + d * to.stride[2], from + d * in.padded_values(), in.values,
          to.stride[3]);
}

template <class RULE, class DECAY>
void read_block(Block<RULE, DECAY>& x, const LowRankInputs& in, const Place& at) {
  constexpr int SIZE = DECAY::SIZE;
  const int64_t head = in.shared(at.head, in.key_heads);
  read_rows(x.receiver[0], SIZE, x.keys, in.q, at, head, in.keys);
  const float scale = float(in.scale);
  for (int64_t i = 0; i < SIZE * x.keys; i += LANES) store(x.receiver[0] + i, load(x.receiver[0] + i) * scale);
  if constexpr (RULE::SOURCES == 1) {
    read_rows(x.receiver[1], SIZE, x.keys, in.k, at, head, in.keys);
    std::fill(x.beta, x.beta + SIZE, 0.0f);
    read(x.beta, in.beta, offset(in.beta, at, at.head), at.count, in.beta.stride[1]);
  } else {
    read_rows(x.receiver[1], SIZE, x.keys, in.a, at, in.shared(at.head, in.a_heads), in.keys);
    read_rows(x.source[0], SIZE, x.keys, in.b, at, in.shared(at.head, in.b_heads), in.keys);
    read_rows(x.source[1], SIZE, x.keys, in.k, at, head, in.keys);
  }
  read_rows(x.v, SIZE, x.values, in.v, at, at.head, in.values);
  x.decay.read_from(in.log_decay, in.log_decay ? offset(in.log_decay, at, at.head) : 0, at.count, in.keys, x.keys);
}

// u, four tokens after four: what earlier ones wrote is a product, and among the four each uses those before it.
template <class RULE, class DECAY>
void solve(Block<RULE, DECAY>& x) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(SIZE, x.values, [&]<int ROWS, int VECTORS>(int64_t i, int64_t c) {
    Tile<ROWS, VECTORS> tile;  // read, then u
    tile.clear();
    tile.add_product({x.reach[1] + i * x.keys, x.keys, 1}, x.state + c, x.values, x.keys);
    if constexpr (RULE::SOURCES == 2)
      add_lower<Triangle::strict>(tile, x.matrix[1][1], SIZE, i, x.v + c, x.values);
    const float* system = x.matrix[1][0] + i * SIZE;
    tile.add_product({system, SIZE, 1}, x.u + c, x.values, i);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) {
#pragma GCC unroll 16
        for (int earlier = 0; earlier < r; earlier++)
          tile.at[r][j] += system[r * SIZE + i + earlier] * tile.at[earlier][j];
        if constexpr (RULE::SOURCES == 1) {
          int64_t at = (i + r) * x.values + c + j * LANES;
          Vec error = load(x.v + at) - tile.at[r][j];
          store(x.error + at, error);
          tile.at[r][j] = x.beta[i + r] * error;
        }
      }
    tile.store(x.u + i * x.values + c, x.values);
  });
}

template <class RULE, class DECAY>
void output(const Block<RULE, DECAY>& x, float* o) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(SIZE, x.values, [&]<int ROWS, int VECTORS>(int64_t i, int64_t c) {
    Tile<ROWS, VECTORS> tile;
    tile.clear();
    tile.add_product({x.reach[0] + i * x.keys, x.keys, 1}, x.state + c, x.values, x.keys);
    add_lower<Triangle::with_diagonal>(tile, x.matrix[0][0], SIZE, i, x.u + c, x.values);
    if constexpr (RULE::SOURCES == 2)
      add_lower<Triangle::with_diagonal>(tile, x.matrix[0][1], SIZE, i, x.v + c, x.values);
    tile.store(o + i * x.values + c, x.values);
  });
}

// The state after the block.
template <class RULE, class DECAY>
void advance(const Block<RULE, DECAY>& x, float* after) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(x.keys, x.values, [&]<int ROWS, int VECTORS>(int64_t d, int64_t c) {
    Tile<ROWS, VECTORS> tile;
    tile.load(x.state + d * x.values + c, x.values);
    tile.scale_rows(x.total + d);
    tile.add_product({x.store[0] + d * SIZE, SIZE, 1}, x.u + c, x.values, SIZE);
    if constexpr (RULE::SOURCES == 2)
      tile.add_product({x.store[1] + d * SIZE, SIZE, 1}, x.v + c, x.values, SIZE);
    tile.store(after + d * x.values + c, x.values);
  });
}

// What a group's backward pass works with, beside the blocks.
template <class RULE, class DECAY>
struct Workspace {
  Gradients<RULE, DECAY> gradient;
  float *d_state, *d_o, *d_read, *d_v;                       // [keys, values], [SIZE, values] each
  float *values_transposed, *state_transposed, *d_transposed;  // [values, SIZE], [values, keys] twice
  float* d_beta;                                             // [SIZE]

  template <class Memory>
  void place(Memory& memory, int64_t keys, int64_t values) {
    constexpr int SIZE = DECAY::SIZE;
    gradient.place(memory, keys);
    d_state = memory.take(keys * values);
    d_o = memory.take(SIZE * values);
    d_read = memory.take(SIZE * values);
    d_v = memory.take(SIZE * values);
    values_transposed = memory.take(SIZE * values);
    state_transposed = memory.take(keys * values);
    d_transposed = memory.take(keys * values);
    d_beta = memory.take(SIZE);
  }
};

// z and the gradients of v and beta, four tokens before four.
template <class RULE, class DECAY>
void solve_backward(const Block<RULE, DECAY>& x, Workspace<RULE, DECAY>& w) {
  constexpr int SIZE = DECAY::SIZE;
  std::fill(w.d_beta, w.d_beta + SIZE, 0.0f);
  for_tiles(SIZE, x.values, [&]<int ROWS, int VECTORS>(int64_t above, int64_t c) {
    const int64_t i = SIZE - ROWS - above;
    Tile<ROWS, VECTORS> tile;  // x, then z
    tile.clear();
    tile.add_product({x.store[0] + i, 1, SIZE}, w.d_state + c, x.values, x.keys);
    add_upper<Triangle::with_diagonal>(tile, x.matrix[0][0], SIZE, i, w.d_o + c, x.values);
    const float* system = x.matrix[1][0] + i;
    const int64_t after = i + ROWS;
    tile.add_product({system + after * SIZE, 1, SIZE}, w.d_read + after * x.values + c, x.values, SIZE - after);
#pragma GCC unroll 16
    for (int r = ROWS - 1; r >= 0; r--) {
      Vec of_beta = zeros();
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) {
#pragma GCC unroll 16
        for (int later = r + 1; later < ROWS; later++)
          tile.at[r][j] += system[(i + later) * SIZE + r] * tile.at[later][j];
        if constexpr (RULE::SOURCES == 1) {
          int64_t at = (i + r) * x.values + c + j * LANES;
          of_beta += tile.at[r][j] * load(x.error + at);
          tile.at[r][j] *= x.beta[i + r];
          store(w.d_v + at, tile.at[r][j]);
          tile.at[r][j] = -tile.at[r][j];
        }
      }
      w.d_beta[i + r] += sum(of_beta);
    }
    tile.store(w.d_read + i * x.values + c, x.values);
  });
}

template <class DECAY>
void second_source_backward(const Block<LowRankRule, DECAY>& x, Workspace<LowRankRule, DECAY>& w) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(SIZE, x.values, [&]<int ROWS, int VECTORS>(int64_t i, int64_t c) {
    Tile<ROWS, VECTORS> tile;
    tile.clear();
    tile.add_product({x.store[1] + i, 1, SIZE}, w.d_state + c, x.values, x.keys);
    add_upper<Triangle::with_diagonal>(tile, x.matrix[0][1], SIZE, i, w.d_o + c, x.values);
    add_upper<Triangle::strict>(tile, x.matrix[1][1], SIZE, i, w.d_read + c, x.values);
    tile.store(w.d_v + i * x.values + c, x.values);
  });
}

// The gradients of products, receivers and sources that the state's decay does not enter any more.
template <class RULE, class DECAY>
void products_backward(const Block<RULE, DECAY>& x, Workspace<RULE, DECAY>& w) {
  constexpr int SIZE = DECAY::SIZE;
  transpose(w.state_transposed, x.keys, x.state, x.values, x.keys, x.values);
  transpose(w.d_transposed, x.keys, w.d_state, x.values, x.keys, x.values);
  const float *reads[2] = {w.d_o, w.d_read}, *values[2] = {x.u, x.v};
  for (int s = 0; s < RULE::SOURCES; s++) {
    transpose(w.values_transposed, SIZE, values[s], x.values, SIZE, x.values);
    for (int r = 0; r < 2; r++) multiply_lower<SIZE>(w.gradient.matrix[r][s], reads[r], w.values_transposed, x.values);
    multiply(w.gradient.store[s], x.keys, {values[s], x.values, 1}, w.d_transposed, x.keys, SIZE, x.keys, x.values);
  }
  for (int r = 0; r < 2; r++)
    multiply(w.gradient.reach[r], x.keys, {reads[r], x.values, 1}, w.state_transposed, x.keys, SIZE, x.keys, x.values);
  for (int64_t d = 0; d < x.keys; d++)
    w.gradient.total[d] = x.total[d] * dot(x.state + d * x.values, w.d_state + d * x.values, x.values);
}

// The gradient of the state before the block from that of the state after it, in place.
template <class RULE, class DECAY>
void advance_backward(const Block<RULE, DECAY>& x, Workspace<RULE, DECAY>& w) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(x.keys, x.values, [&]<int ROWS, int VECTORS>(int64_t d, int64_t c) {
    Tile<ROWS, VECTORS> tile;
    float* at = w.d_state + d * x.values + c;
    tile.load(at, x.values);
    tile.scale_rows(x.total + d);
    tile.add_product({x.reach[0] + d, 1, x.keys}, w.d_o + c, x.values, SIZE);
    tile.add_product({x.reach[1] + d, 1, x.keys}, w.d_read + c, x.values, SIZE);
    tile.store(at, x.values);
  });
}

template <class RULE, class DECAY>
void write_gradients(const LowRankBackward& arguments, const Place& at, const Block<RULE, DECAY>& x,
                     Workspace<RULE, DECAY>& w) {
  constexpr int SIZE = DECAY::SIZE;
  const LowRankInputs& in = arguments.in;
  float **receiver = w.gradient.receiver, **source = w.gradient.source;
  const float scale = float(in.scale);
  for (int64_t i = 0; i < SIZE * x.keys; i += LANES) {
    store(receiver[0] + i, load(receiver[0] + i) * scale);
    if constexpr (RULE::SOURCES == 1) store(source[0] + i, load(source[0] + i) + load(receiver[1] + i));
  }
  write_rows(arguments.d_q, at, receiver[0], x.keys, in.keys);
  write_rows(arguments.d_k, at, source[RULE::SOURCES - 1], x.keys, in.keys);
  write_rows(arguments.d_v, at, w.d_v, x.values, in.values);
  if constexpr (RULE::SOURCES == 1) {
    const Tensor& d_beta = arguments.d_beta;
    write(d_beta, offset(d_beta, at, at.head), w.d_beta, at.count, d_beta.stride[1]);
  } else {
    write_rows(arguments.d_a, at, receiver[1], x.keys, in.keys);
    write_rows(arguments.d_b, at, source[0], x.keys, in.keys);
  }
  const Tensor& d_g = arguments.d_log_decay;
  if (!d_g) return;
  if constexpr (std::is_same_v<DECAY, TokenDecay>) {
    write(d_g, offset(d_g, at, at.head), w.gradient.log_decay, at.count, d_g.stride[1]);
  } else {
    write_rows(d_g, at, w.gradient.log_decay, x.keys, in.keys);
  }
}

template <class RULE, class DECAY>
struct GroupForward {
  Block<RULE, DECAY> block;
  float* o;

  template <class Memory>
  void place(Memory& memory, const LowRankInputs& in) {
    block.place(memory, in.padded_keys(), in.padded_values());
    o = memory.take(DECAY::SIZE * block.values);
  }

  // Tokens begin .. end of a head, from the state that stands in `last`, and to there.
  void run(const LowRankForward& x, const Sequence& s, int64_t n, int64_t head, int64_t begin, int64_t end) {
    read_state(block.state, begin == s.start ? x.state : x.last, n, head, x.in);
    if (x.starts)
      write_state(x.starts, x.in.first_group(s, n) + (begin - s.start) / x.in.group, head, block.state, x.in);
    for (int64_t t = begin; t < end; t += DECAY::SIZE) {
      Place at{s.row, t, std::min<int64_t>(DECAY::SIZE, end - t), head};
      read_block(block, x.in, at);
      DECAY::multiply(block);
      solve(block);
      output(block, o);
      advance(block, block.state);
      write_rows(x.o, at, o, block.values, x.in.values);
    }
    write_state(x.last, n, head, block.state, x.in);
  }
};

template <class RULE, class DECAY>
struct GroupBackward {
  Block<RULE, DECAY>* blocks;
  Workspace<RULE, DECAY> work;

  template <class Memory>
  void place(Memory& memory, const LowRankInputs& in) {
    const int64_t count = in.group / DECAY::SIZE;
    blocks = memory.template take<Block<RULE, DECAY>>(count);
    Block<RULE, DECAY> other;
    for (int64_t i = 0; i < count; i++) (blocks ? blocks[i] : other).place(memory, in.padded_keys(), in.padded_values());
    work.place(memory, in.padded_keys(), in.padded_values());
  }

  // Tokens begin .. end of a head, from the gradient that stands in `d_state`, and to there.
  void run(const LowRankBackward& x, const Sequence& s, int64_t n, int64_t head, int64_t begin, int64_t end) {
    constexpr int SIZE = DECAY::SIZE;
    const LowRankInputs& in = x.in;
    const int64_t count = (end - begin + SIZE - 1) / SIZE;
    auto place = [&](int64_t i) {
      int64_t t = begin + i * SIZE;
      return Place{s.row, t, std::min<int64_t>(SIZE, end - t), head};
    };
    read_state(blocks[0].state, x.starts, in.first_group(s, n) + (begin - s.start) / in.group, head, in);
    for (int64_t i = 0; i < count; i++) {
      read_block(blocks[i], in, place(i));
      DECAY::multiply(blocks[i]);
      solve(blocks[i]);
      if (i + 1 < count) advance(blocks[i], blocks[i + 1].state);
    }
    read_state(work.d_state, end == s.stop ? x.d_last : x.d_state, n, head, in);
    for (int64_t i = count - 1; i >= 0; i--) {
      const Block<RULE, DECAY>& block = blocks[i];
      read_rows(work.d_o, SIZE, block.values, x.d_o, place(i), head, in.values);
      solve_backward(block, work);
      if constexpr (RULE::SOURCES == 2) second_source_backward(block, work);
      products_backward(block, work);
      DECAY::multiply_backward(block, work.gradient);
      write_gradients(x, place(i), block, work);
      advance_backward(block, work);
    }
    write_state(x.d_state, n, head, work.d_state, in);
  }
};

// visit(sequence, its number, first head, last head + 1) for units begin .. end, one head of one sequence each.
template <class Visit>
INLINE void for_sequences(const LowRankInputs& in, int64_t begin, int64_t end, Visit visit) {
  while (begin < end) {
    int64_t n = begin / in.heads, stop = std::min(end, (n + 1) * in.heads);
    visit(sequence_of(in.cu_seqlens, n, in.length), n, begin - n * in.heads, stop - n * in.heads);
    begin = stop;
  }
}

template <class GROUP>
GROUP placed(const LowRankInputs& in) {
  GROUP group;
  Counter counter;
  group.place(counter, in);
  Scratch scratch(counter.bytes);
  group.place(scratch, in);
  return group;
}

template <class RULE, class DECAY>
void low_rank_forward(const LowRankForward& x) {
  const LowRankInputs& in = x.in;
  parallel_ranges(in.sequences * in.heads, [&](int64_t begin, int64_t end) {
    auto group = placed<GroupForward<RULE, DECAY>>(in);
    for_sequences(in, begin, end, [&](const Sequence& s, int64_t n, int64_t first, int64_t stop) {
      // Group after group, and in it head after head: the heads of a token share pages of memory. An empty sequence has
      // one group without tokens, which hands its state on.
      int64_t t = s.start;
      do {
        for (int64_t head = first; head < stop; head++) group.run(x, s, n, head, t, std::min(t + in.group, s.stop));
        t += in.group;
      } while (t < s.stop);
    });
  });
}

template <class RULE, class DECAY>
void low_rank_backward(const LowRankBackward& x) {
  const LowRankInputs& in = x.in;
  parallel_ranges(in.sequences * in.heads, [&](int64_t begin, int64_t end) {
    auto group = placed<GroupBackward<RULE, DECAY>>(in);
    for_sequences(in, begin, end, [&](const Sequence& s, int64_t n, int64_t first, int64_t stop) {
      int64_t t = s.start + std::max<int64_t>(s.stop - s.start - 1, 0) / in.group * in.group;
      for (; t >= s.start; t -= in.group)
        for (int64_t head = first; head < stop; head++) group.run(x, s, n, head, t, std::min(t + in.group, s.stop));
    });
  });
}

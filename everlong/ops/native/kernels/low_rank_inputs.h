// What the kernels with a low-rank correction are called with, and how tokens and states come from there and go back.
#pragma once
#include "low_rank_block.h"

namespace low_rank {

struct LowRankInputs {
  Tensor q, k, v, beta, a, b, log_decay;  // [B, T, heads, channels]; without channels beta and the decay of tokens
  Tensor cu_seqlens;
  int64_t sequences, length, heads, key_heads, a_heads, b_heads, keys, values, by_channel, group, threads;
  double scale;

  // The head of x that a head of v uses.
  int64_t shared(int64_t head, int64_t heads_of_x) const { return head / (heads / heads_of_x); }
  // Results beyond the size of a processor's cache are not read from there again.
  Stores stores() const {
    const int64_t numbers = (cu_seqlens ? 1 : sequences) * length * heads * std::max(keys, values);
    return numbers > (1 << 20) ? Stores::streamed : Stores::cached;
  }
  int64_t padded_keys() const { return round_up(keys, LINE); }
  int64_t padded_values() const { return round_up(values, LINE); }
  // Where the state before token t of a sequence stands among those kept: each sequence has room for its groups.
  int64_t group_at(const Sequence& s, int64_t n, int64_t t) const {
    int64_t first = cu_seqlens ? s.start / group + n : n * std::max<int64_t>((length + group - 1) / group, 1);
    return first + (t - s.start) / group;
  }
};

struct LowRankForward {
  LowRankInputs in;
  Tensor state, o, last, starts;  // [N, H, K, V], as v, [N, H, K, V], [groups, H, K, V]: none where not kept
};

struct LowRankBackward {
  LowRankInputs in;
  Tensor starts, ends;  // [groups, H, K, V]: states before a group; room for the gradients of those after it, or none
  Tensor d_o, d_last;
  Tensor d_q, d_k, d_v, d_beta, d_a, d_b, d_log_decay, d_state;  // d_q .. d_b for each head of v
};

// Columns `from` .. of values or states.
INLINE Tensor columns(Tensor x, int64_t from) {
  if (x) x.data = static_cast<char*>(x.data) + from * x.stride[3] * (x.type == Type::bfloat16 ? 2 : 4);
  return x;
}
INLINE LowRankInputs columns(LowRankInputs x, int64_t from, int64_t count) {
  x.v = columns(x.v, from);
  x.values = std::min(count, x.values - from);
  return x;
}
INLINE LowRankForward columns(LowRankForward x, int64_t from, int64_t count) {
  x.in = columns(x.in, from, count);
  for (Tensor* y : {&x.state, &x.o, &x.last, &x.starts}) *y = columns(*y, from);
  return x;
}
// Those that carrying the state's gradient needs.
INLINE LowRankBackward columns(LowRankBackward x, int64_t from, int64_t count) {
  x.in = columns(x.in, from, count);
  for (Tensor* y : {&x.ends, &x.d_o, &x.d_last, &x.d_state}) *y = columns(*y, from);
  return x;
}

// Tokens of one head of one sequence.
struct Place {
  int64_t row, start, count, head;
};

INLINE int64_t offset(const Tensor& x, const Place& at, int64_t head) {
  return at.row * x.stride[0] + at.start * x.stride[1] + head * x.stride[2];
}

// [size, width] as float32, zeros around what is there.
inline void read_rows(float* to, int64_t size, int64_t width, const Tensor& from, const Place& at, int64_t head,
                      int64_t channels) {
  const int64_t first = offset(from, at, head);
  if (channels == width && from.stride[3] == 1) {
    with_type(from, [&](auto number) {
      const auto* row = static_cast<const decltype(number)*>(from.data) + first;
      for (int64_t i = 0; i < at.count; i++, row += from.stride[1])
        for (int64_t c = 0; c < width; c += LANES) store(to + i * width + c, load(row + c));
    });
  } else {
    std::fill(to, to + at.count * width, 0.0f);
    for (int64_t i = 0; i < at.count; i++)
      read(to + i * width, from, first + i * from.stride[1], channels, from.stride[3]);
  }
  std::fill(to + at.count * width, to + size * width, 0.0f);
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

inline void write_state(const Tensor& to, int64_t n, int64_t head, const float* from, const LowRankInputs& in,
                        Stores stores = Stores::cached) {
  for (int64_t d = 0; d < in.keys; d++) {
    const int64_t first = n * to.stride[0] + head * to.stride[1] + d * to.stride[2];
    write_row(to, first, from + d * in.padded_values(), in.values, to.stride[3], stores);
  }
}

// The same state of another tensor; nothing given is zeros.
inline void copy_state(const Tensor& to, int64_t n, const Tensor& from, int64_t m, int64_t head,
                       const LowRankInputs& in) {
  for (int64_t d = 0; d < in.keys; d++) {
    float* row = to.at<float>(n, head, d);
    if (from) {
      read(row, from, m * from.stride[0] + head * from.stride[1] + d * from.stride[2], in.values, from.stride[3]);
    } else {
      std::fill(row, row + in.values, 0.0f);
    }
  }
}

// What `read_block` will read.
template <class RULE>
void fetch_block(Meanwhile& meanwhile, const LowRankInputs& in, const Place& at) {
  auto fetch = [&](const Tensor& x, int64_t heads, int64_t channels) {
    meanwhile.fetch(x, offset(x, at, in.shared(at.head, heads)), at.count, channels);
  };
  fetch(in.q, in.key_heads, in.keys);
  fetch(in.k, in.key_heads, in.keys);
  fetch(in.v, in.heads, in.values);
  if (in.by_channel) fetch(in.log_decay, in.heads, in.keys);
  if constexpr (RULE::SOURCES == 2) {
    fetch(in.a, in.a_heads, in.keys);
    fetch(in.b, in.b_heads, in.keys);
  }
}

// Tokens of a head as a block of what the equations are about.
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

template <class RULE, class DECAY>
void write_gradients(Meanwhile& meanwhile, const LowRankBackward& x, const Place& at, Workspace<RULE, DECAY>& w) {
  constexpr int SIZE = DECAY::SIZE;
  const LowRankInputs& in = x.in;
  const int64_t keys = in.padded_keys();
  float **receiver = w.gradient.receiver, **source = w.gradient.source;
  for (int64_t i = 0; i < SIZE * keys; i += LANES) {
    store(receiver[0] + i, load(receiver[0] + i) * float(in.scale));
    if constexpr (RULE::SOURCES == 1) store(source[0] + i, load(source[0] + i) + load(receiver[1] + i));
  }
  auto write_rows = [&](const Tensor& to, const float* from, int64_t width, int64_t channels) {
    meanwhile.write(to, offset(to, at, at.head), at.count, channels, from, width);
  };
  auto write_numbers = [&](const Tensor& to, const float* from) {
    if (to) write(to, offset(to, at, at.head), from, at.count, to.stride[1]);
  };
  write_rows(x.d_q, receiver[0], keys, in.keys);
  write_rows(x.d_k, source[RULE::SOURCES - 1], keys, in.keys);
  write_rows(x.d_v, w.d_v, in.padded_values(), in.values);
  if constexpr (RULE::SOURCES == 1) {
    write_numbers(x.d_beta, w.d_beta);
  } else {
    write_rows(x.d_a, receiver[1], keys, in.keys);
    write_rows(x.d_b, source[0], keys, in.keys);
  }
  if (in.by_channel) {
    write_rows(x.d_log_decay, w.gradient.log_decay, keys, in.keys);
  } else {
    write_numbers(x.d_log_decay, w.gradient.log_decay);
  }
}

}  // namespace low_rank

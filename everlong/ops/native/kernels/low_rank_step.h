// A few tokens, one after another: the state is read once for what the two receivers find, and once more to be rewritten.
//
//   read = S^T receiver_1      u = beta (v - read) or read      S' = total S + source_0 u^T + source_1 v^T
//   o    = S'^T q = S^T (total q) + (q . source_0) u + (q . source_1) v
#pragma once
#include "low_rank_inputs.h"

namespace low_rank {

constexpr int64_t STEPS = 4;  // sequences of up to so many tokens are not worth a block

// One token of one head, channels padded by zeros; the receivers are those that read the state before the token.
template <class RULE>
struct Token {
  float *q, *receiver[2], *source[RULE::SOURCES], *total;  // [keys]
  float *v, *o;                                            // [values]
  float beta;

  template <class Memory>
  void place(Memory& memory, int64_t keys, int64_t values) {
    q = memory.take(keys);
    for (float*& x : receiver) x = memory.take(keys);
    for (float*& x : source) x = memory.take(keys);
    total = memory.take(keys);
    v = memory.take(values);
    o = memory.take(values);
  }
};

// Columns c .. of the state, `count` of them in the last vector; the new state may stand where the old one does.
template <int VECTORS, class RULE>
INLINE void step_columns(const Token<RULE>& x, const float* state, int64_t row, float* after, int64_t after_row,
                         int64_t keys, const float* weights, int64_t c, int64_t count) {
  Vec found[2][VECTORS] = {};
  auto column = [&](int j) { return c + j * LANES; };
  auto load_column = [&](int64_t d, int j) {
    const float* at = state + d * row + column(j);
    return VECTORS > 1 ? load(at) : load_some(at, count);
  };
  for (int64_t d = 0; d < keys; d++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      Vec of_state = load_column(d, j);
      found[0][j] += x.receiver[0][d] * of_state;
      found[1][j] += x.receiver[1][d] * of_state;
    }
  Vec u[VECTORS], v[VECTORS];
  for (int j = 0; j < VECTORS; j++) {
    v[j] = load(x.v + column(j));
    u[j] = RULE::SOURCES == 1 ? x.beta * (v[j] - found[1][j]) : found[1][j];
    found[0][j] += weights[0] * u[j];
    if constexpr (RULE::SOURCES == 2) found[0][j] += weights[1] * v[j];
    store(x.o + column(j), found[0][j]);
  }
  for (int64_t d = 0; d < keys; d++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      Vec next = x.total[d] * load_column(d, j) + x.source[0][d] * u[j];
      if constexpr (RULE::SOURCES == 2) next += x.source[1][d] * v[j];
      float* at = after + d * after_row + column(j);
      VECTORS > 1 ? store(at, next) : store_some(at, next, count);
    }
}

// [keys, values] with rows `row` apart.
template <class RULE>
void step(const Token<RULE>& x, const float* state, int64_t row, float* after, int64_t after_row, int64_t keys,
          int64_t values) {
  float weights[RULE::SOURCES];
  for (int s = 0; s < RULE::SOURCES; s++) weights[s] = sum(dots(x.q, x.source[s], round_up(keys, LINE)));
  int64_t c = 0;
  for (; c + 4 * LANES <= values; c += 4 * LANES)
    step_columns<4>(x, state, row, after, after_row, keys, weights, c, LANES);
  for (; c < values; c += LANES)
    step_columns<1>(x, state, row, after, after_row, keys, weights, c, std::min<int64_t>(LANES, values - c));
}

// Up to STEPS tokens of a head.
template <class RULE>
struct FewTokens {
  Token<RULE> token;

  template <class Memory>
  void place(Memory& memory, const LowRankInputs& in) {
    token.place(memory, in.padded_keys(), in.padded_values());
  }

  void run(const LowRankForward& x, const Sequence& s, int64_t n, int64_t head) {
    const LowRankInputs& in = x.in;
    float* after = x.last.at<float>(n, head);
    const float* state = after;
    int64_t row = x.last.stride[2];
    if (x.state.type == Type::float32 && x.state.stride[3] == 1) {
      state = x.state.at<float>(n, head);
      row = x.state.stride[2];
    } else {
      copy_state(x.last, n, x.state, n, head, in);
    }
    if (x.starts) copy_state(x.starts, in.group_at(s, n, s.start), x.state, n, head, in);
    for (int64_t t = s.start; t < s.stop; t++) {
      Place at{s.row, t, 1, head};
      read_token(in, at);
      step(token, state, row, after, x.last.stride[2], in.keys, in.values);
      write(x.o, offset(x.o, at, head), token.o, in.values, x.o.stride[3]);
      state = after, row = x.last.stride[2];
    }
    if (s.start == s.stop) copy_state(x.last, n, x.state, n, head, in);
  }

  void read_token(const LowRankInputs& in, const Place& at) {
    const int64_t keys = in.padded_keys(), head = in.shared(at.head, in.key_heads);
    read_rows(token.q, 1, keys, in.q, at, head, in.keys);
    read_rows(token.source[RULE::SOURCES - 1], 1, keys, in.k, at, head, in.keys);
    read_rows(token.v, 1, in.padded_values(), in.v, at, at.head, in.values);
    read_decay(in, at);
    const float* second = token.source[0];
    if constexpr (RULE::SOURCES == 1) {
      read(&token.beta, in.beta, offset(in.beta, at, at.head), 1, 1);
    } else {
      read_rows(token.source[0], 1, keys, in.b, at, in.shared(at.head, in.b_heads), in.keys);
      read_rows(token.receiver[1], 1, keys, in.a, at, in.shared(at.head, in.a_heads), in.keys);
      second = token.receiver[1];
    }
    for (int64_t d = 0; d < keys; d += LANES) {
      Vec q = load(token.q + d) * float(in.scale), total = load(token.total + d);
      store(token.q + d, q);
      store(token.receiver[0] + d, q * total);
      store(token.receiver[1] + d, RULE::LATE ? load(second + d) : load(second + d) * total);
    }
  }

  void read_decay(const LowRankInputs& in, const Place& at) {
    const int64_t keys = in.padded_keys();
    if (in.by_channel) {
      read_rows(token.total, 1, keys, in.log_decay, at, at.head, in.keys);
    } else {
      float g = 0.0f;
      if (in.log_decay) read(&g, in.log_decay, offset(in.log_decay, at, at.head), 1, 1);
      std::fill(token.total, token.total + keys, g);
    }
    for (int64_t d = 0; d < keys; d += LANES) store(token.total + d, exp(load(token.total + d)));
  }
};

}  // namespace low_rank

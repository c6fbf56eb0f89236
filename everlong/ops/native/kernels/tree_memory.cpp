// Operators with a matrix state over a tree of tokens: each node sees the incoming state, its ancestors and itself.
//
//   linear      o = A_qk v + q' S_0
//   delta rule  u = beta (v - A_kk u - k' S_0)      o = A_qk u + q' S_0
//   low rank    u = A_ab u + A_ak v + a' S_0        o = A_qb u + A_qk v + q' S_0
//
// A_xy: receivers x times sources y under the decays between them, and x' the receiver under all decays of its path. A
// receiver walks from its node to the root: it meets the sources of an ancestor, is multiplied by the decay of that
// ancestor and goes on. So a weight is a product of decays in which nothing is divided or subtracted, and a node touches
// nothing but its ancestors: whatever stands elsewhere, NaN too, stays there. `late` receivers do not feel the decay of
// their own node. Parents come first, so the systems for u are solved in one pass over the nodes.
//
// A unit of work is one head of one sequence; all that it needs lies in scratch memory, the states of nodes nowhere.
#include "products.h"
#include "trees.h"

namespace {

struct Arguments {
  Tensor q, k, v;                        // [B, T, h, K] twice, [B, T, H, V]
  Tensor log_decay, bonus, beta, a, b;   // [B, T, H] or [B, T, H, K]; [H, K]; [B, T, H]; [B, T, h or H, K] twice; or none
  Tensor state, total;                   // [B, H, K, V], and [B, H, K] where the output is normalized
  Tensor parents;                        // [T]
  Tensor o, u;                           // [B, T, H, V]
  int64_t sequences, length, heads, heads_of_q, heads_of_a, heads_of_b, keys, values, channels_decay;
  double scale;
};

enum class Decay { none, of_tokens, of_channels };
enum class Rule { linear, delta, low_rank };
constexpr int receivers_of(Rule rule) { return rule == Rule::linear ? 1 : 2; }
constexpr int sources_of(Rule rule) { return rule == Rule::low_rank ? 2 : 1; }

struct Sizes {
  int64_t length, keys, values, steps;  // the last three filled up to whole vectors
  int64_t depth, rows;                  // channels of keys, and rows of receivers that tiles cover

  Sizes(const Arguments& x, int receivers, int64_t steps)
      : length(x.length), keys(round_up(x.keys, LANES)), values(round_up(x.values, LANES)),
        steps(round_up(steps, LANES)), depth(x.keys), rows(round_up(receivers * x.length, TILE_ROWS)) {}
};

// A unit's memory.
template <Rule RULE>
struct Room {
  static constexpr int R = receivers_of(RULE), S = sources_of(RULE);
  Sizes sizes;
  float* receivers;   // [R * T, K]; after the walk under the decays of their paths
  float* own;         // [T, K]: queries times bonus
  float* sources[S];  // [T, K]
  float* decays;      // [T] or [T, K]
  float* weights[R][S];  // [steps]
  float* outputs;     // [R * T, V]: first the receivers times the state, then those of the queries become o
  float *v, *u;       // [T, V]
  float* beta;        // [T]
  float *state, *total;  // [K, V] where it cannot be read in place, [K]

  static int64_t bytes(const Sizes& s) {
    int64_t numbers = s.rows * (s.keys + s.values) + s.length * ((S + 2) * s.keys + 2 * s.values + 2) +
                      R * S * s.steps + s.keys * (s.values + 1);
    return 4 * numbers + 64 * 16 + Paths::bytes(s.length);
  }
  Room(const Sizes& s, Scratch& scratch) : sizes(s) {
    receivers = scratch.take(s.rows * s.keys);
    own = scratch.take(s.length * s.keys);
    for (float*& source : sources) source = scratch.take(s.length * s.keys);
    decays = scratch.take(s.length * (s.keys + 1));
    for (auto& row : weights)
      for (float*& weight : row) weight = scratch.take(s.steps);
    outputs = scratch.take(s.rows * s.values);
    v = scratch.take(s.length * s.values);
    u = scratch.take(s.length * s.values);
    beta = scratch.take(s.length);
    state = scratch.take(s.keys * s.values);
    total = scratch.take(s.keys);
  }
  float* receiver(int r) const { return receivers + r * sizes.length * sizes.keys; }
  float* output(int r) const { return outputs + r * sizes.length * sizes.values; }
};

// Tokens of one head as rows of `width` numbers, zeros behind the `count` that there are.
void read_rows(float* to, int64_t width, const Tensor& from, int64_t n, int64_t length, int64_t head, int64_t count,
               float scale = 1.0f) {
  with_type(from, [&](auto number) {
    using Number = decltype(number);
    for (int64_t t = 0; t < length; t++) {
      const Number* row = from.at<Number>(n, t, head);
      for (int64_t i = 0; i < width; i += LANES) store(to + t * width + i, load_some(row + i, count - i) * scale);
    }
  });
}

void exponentiate(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store_some(x + i, exp(load_some(x + i, count - i)), count - i);
}

template <Rule RULE>
void read_unit(const Arguments& x, const Room<RULE>& room, int64_t n, int64_t head) {
  const Sizes& s = room.sizes;
  auto head_of = [&](int64_t heads) { return head * heads / x.heads; };
  auto keys = [&](float* to, const Tensor& from, int64_t heads, float scale = 1.0f) {
    read_rows(to, s.keys, from, n, s.length, head_of(heads), x.keys, scale);
  };
  keys(room.receiver(0), x.q, x.heads_of_q, float(x.scale));
  keys(room.sources[room.S - 1], x.k, x.heads_of_q);
  if constexpr (RULE == Rule::delta) keys(room.receiver(1), x.k, x.heads_of_q);
  if constexpr (RULE == Rule::low_rank) {
    keys(room.receiver(1), x.a, x.heads_of_a);
    keys(room.sources[0], x.b, x.heads_of_b);
  }
  for (int64_t i = room.R * s.length * s.keys; i < s.rows * s.keys; i += LANES) store(room.receivers + i, zeros());
  read_rows(room.v, s.values, x.v, n, s.length, head, x.values);
  if (x.beta) read(room.beta, x.beta, n * x.beta.stride[0] + head * x.beta.stride[2], s.length, x.beta.stride[1]);
  if (!x.log_decay) return;
  if (x.channels_decay) {
    keys(room.decays, x.log_decay, x.heads);
    exponentiate(room.decays, s.length * s.keys);
  } else {
    const Tensor& g = x.log_decay;
    read(room.decays, g, n * g.stride[0] + head * g.stride[2], s.length, g.stride[1]);
    exponentiate(room.decays, s.length);
  }
}

// Products of a walk, LANES steps at a time: a step's vectors are kept until their lanes are summed for all together.
template <int R, int S>
struct Products {
  Vec parts[R][S][LANES];
  int64_t step = 0;
  bool more;  // sums of other channels are there already

  template <Rule RULE>
  INLINE void flush(const Room<RULE>& room, int64_t first) {
#pragma GCC unroll 4
    for (int i = 0; i < R * S; i++) {
      float* to = room.weights[i / S][i % S] + first;
      Vec sum = sums(parts[i / S][i % S]);
      store(to, more ? load(to) + sum : sum);
    }
  }
};

// All walks, for N vectors of channels from channel `c` on: weights, and receivers as they arrive at the root.
template <Rule RULE, Decay DECAY, int N>
void walk(const Arguments& x, const Paths& paths, const Room<RULE>& room, int64_t c) {
  constexpr int R = receivers_of(RULE), S = sources_of(RULE);
  const int64_t width = room.sizes.keys;
  Products<R, S> products{{}, 0, c > 0};
  const bool late[2] = {bool(x.bonus), RULE == Rule::low_rank};
  for (int64_t node = 0; node < paths.count; node++) {
    Vec receivers[R][N];
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) receivers[r][n] = load(room.receiver(r) + node * width + c + n * LANES);
    paths.walk(node, paths.first[node], [&](int64_t step, int64_t ancestor) {
      const bool self = ancestor == node;
#pragma GCC unroll 2
      for (int s = 0; s < S; s++) {
        const float* source = room.sources[s] + ancestor * width + c;
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
          Vec product = zeros();
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) {
            Vec receiver = receivers[r][n];
            if (RULE == Rule::linear && self && x.bonus) receiver = load(room.own + node * width + c + n * LANES);
            product += receiver * load(source + n * LANES);
          }
          products.parts[r][s][step % LANES] = product;
        }
      }
      if constexpr (DECAY != Decay::none) {
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          Vec decay = DECAY == Decay::of_tokens ? broadcast(room.decays[ancestor])
                                                : load(room.decays + ancestor * width + c + n * LANES);
#pragma GCC unroll 2
          for (int r = 0; r < R; r++)
            if (!(self && late[r])) receivers[r][n] *= decay;
        }
      }
      if (step % LANES == LANES - 1) products.flush(room, step - LANES + 1);
    });
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) store(room.receiver(r) + node * width + c + n * LANES, receivers[r][n]);
  }
  int64_t steps = paths.first[paths.count];
  if (steps % LANES) products.flush(room, steps / LANES * LANES);
}

template <Rule RULE, Decay DECAY>
void walk(const Arguments& x, const Paths& paths, const Room<RULE>& room) {
  int64_t c = 0;
  for (; c + TILE_VECTORS * LANES <= room.sizes.keys; c += TILE_VECTORS * LANES)
    walk<RULE, DECAY, TILE_VECTORS>(x, paths, room, c);
  for (; c < room.sizes.keys; c += LANES) walk<RULE, DECAY, 1>(x, paths, room, c);
}

// Receivers at the root times the incoming state.
template <Rule RULE>
void read_state(const Arguments& x, const Room<RULE>& room, int64_t n, int64_t head) {
  const Sizes& s = room.sizes;
  const float* state = x.state.at<float>(n, head);
  int64_t row = x.state.stride[2];
  if (s.values != x.values) {
    for (int64_t k = 0; k < s.depth; k++)
      for (int64_t i = 0; i < s.values; i += LANES)
        store(room.state + k * s.values + i, load_some(state + k * row + i, x.values - i));
    state = room.state, row = s.values;
  }
  multiply(room.outputs, s.values, {room.receivers, s.keys, 1}, state, row, s.rows, s.values, s.depth);
}

// What is written and read along the paths, for N vectors of values from channel `c` on.
template <Rule RULE, int N>
void finish(const Paths& paths, const Room<RULE>& room, int64_t c) {
  struct Row {
    Vec at[N];
    INLINE Row(const float* from) {
      for (int n = 0; n < N; n++) at[n] = load(from + n * LANES);
    }
    INLINE void add(float weight, const float* from) {
      for (int n = 0; n < N; n++) at[n] += weight * load(from + n * LANES);
    }
    INLINE void store_to(float* to) const {
      for (int n = 0; n < N; n++) store(to + n * LANES, at[n]);
    }
  };
  const int64_t width = room.sizes.values;
  const float *v = room.v + c, *const* of_q = room.weights[0];
  float* u = room.u + c;
  for (int64_t node = 0; node < paths.count; node++) {
    const int64_t first = paths.first[node];
    if constexpr (RULE != Rule::linear) {
      const float* const* reading = room.weights[1];
      Row row(room.output(1) + node * width + c);
      paths.walk(paths.parents[node], first + 1, [&](int64_t step, int64_t ancestor) {
        row.add(reading[0][step], u + ancestor * width);
        if constexpr (RULE == Rule::low_rank) row.add(reading[1][step], v + ancestor * width);
      });
      if constexpr (RULE == Rule::delta)
        for (int n = 0; n < N; n++) row.at[n] = room.beta[node] * (load(v + node * width + n * LANES) - row.at[n]);
      row.store_to(u + node * width);
    }
    Row row(room.output(0) + node * width + c);
    paths.walk(node, first, [&](int64_t step, int64_t ancestor) {
      row.add(of_q[0][step], (RULE == Rule::linear ? v : u) + ancestor * width);
      if constexpr (RULE == Rule::low_rank) row.add(of_q[1][step], v + ancestor * width);
    });
    row.store_to(room.output(0) + node * width + c);
  }
}

// o / (q' z_0 + the sum of a node's weights), 0 where that is 0.
void normalize(const Arguments& x, const Paths& paths, const Room<Rule::linear>& room, int64_t n, int64_t head) {
  const Sizes& s = room.sizes;
  for (int64_t i = 0; i < s.keys; i += LANES)
    store(room.total + i, load_some(x.total.at<float>(n, head) + i, x.keys - i));
  for (int64_t node = 0; node < s.length; node++) {
    Vec of_state = zeros();
    for (int64_t i = 0; i < s.keys; i += LANES)
      of_state += load(room.receiver(0) + node * s.keys + i) * load(room.total + i);
    float by = sum(of_state);
    for (int64_t step = paths.first[node]; step < paths.first[node + 1]; step++) by += room.weights[0][0][step];
    float* row = room.output(0) + node * s.values;
    for (int64_t i = 0; i < s.values; i += LANES) store(row + i, by == 0.0f ? zeros() : load(row + i) / by);
  }
}

template <Rule RULE>
void unit(const Arguments& x, const Paths& paths, const Room<RULE>& room, int64_t n, int64_t head) {
  const Sizes& s = room.sizes;
  read_unit(x, room, n, head);
  if (x.bonus)
    for (int64_t node = 0; node < s.length; node++)
      for (int64_t i = 0; i < s.keys; i += LANES)
        store(room.own + node * s.keys + i, load(room.receiver(0) + node * s.keys + i) *
                                                load_some(x.bonus.at<float>(head) + i, x.keys - i));
  if (!x.log_decay) {
    walk<RULE, Decay::none>(x, paths, room);
  } else if (x.channels_decay) {
    walk<RULE, Decay::of_channels>(x, paths, room);
  } else {
    walk<RULE, Decay::of_tokens>(x, paths, room);
  }
  read_state(x, room, n, head);
  int64_t c = 0;
  for (; c + TILE_VECTORS * LANES <= s.values; c += TILE_VECTORS * LANES)
    finish<RULE, TILE_VECTORS>(paths, room, c);
  for (; c < s.values; c += LANES) finish<RULE, 1>(paths, room, c);
  if constexpr (RULE == Rule::linear)
    if (x.total) normalize(x, paths, room, n, head);
  for (int64_t t = 0; t < s.length; t++) {
    auto place = [&](const Tensor& to) { return n * to.stride[0] + t * to.stride[1] + head * to.stride[2]; };
    write(x.o, place(x.o), room.output(0) + t * s.values, x.values, 1);
    if (RULE != Rule::linear) write(x.u, place(x.u), room.u + t * s.values, x.values, 1);
  }
}

template <Rule RULE>
void run(const Arguments& x) {
  Sizes sizes(x, receivers_of(RULE), steps_of(x.parents, x.length));
  int64_t operations = sizes.rows * sizes.keys * sizes.values;
  parallel_if_much(x.sequences * x.heads, x.sequences * x.heads * operations, [&](int64_t begin, int64_t end) {
    Scratch scratch(Room<RULE>::bytes(sizes));
    Paths paths(x.parents, x.length, scratch);
    Room<RULE> room(sizes, scratch);
    for (int64_t i = begin; i < end; i++) unit(x, paths, room, i / x.heads, i % x.heads);
  });
}

}  // namespace

KERNEL(tree_memory, Arguments) {
  if (arguments.length == 0) return;
  if (arguments.beta) {
    run<Rule::delta>(arguments);
  } else if (arguments.a) {
    run<Rule::low_rank>(arguments);
  } else {
    run<Rule::linear>(arguments);
  }
}

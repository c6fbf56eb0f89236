// The state after a path of a tree, from what its nodes have written (see everlong/ops/tree.py):
//
//   S = e^{G_0} S_0 + sum_j e^{G_j} k_j u_j^T        G_j the sum of log-decays of the nodes behind j on the path
//
// A unit of work is one head of one sequence. It goes from the last node of the path to the first with the product of
// the decays that it has passed, and then makes the state in one pass.
#include <algorithm>

#include "products.h"
#include "trees.h"

namespace {

struct Arguments {
  Tensor paths;                   // [B, P]: nodes from the first to the last, then -1
  Tensor keys, values;            // [B, T, h, K], [B, T, H, V]
  Tensor other_keys, other_values;  // the same, or none
  Tensor log_decay;               // [B, T, H] or [B, T, H, K], or none
  Tensor state, total;            // [B, H, K, V], and [B, H, K] or none
  Tensor new_state, new_total;
  int64_t sequences, longest, heads, heads_of_keys, heads_of_others, channels, width, channels_decay;
};

// What is written: rows of keys under the decays behind them, and of values beside each other.
struct Written {
  int64_t key_width, value_width, rows = 0;
  float *keys, *values, *decay;  // [2 P, K], [2 P, V], [K]

  static int64_t bytes(const Arguments& x) {
    int64_t keys = round_up(x.channels, LANES), values = round_up(x.width, LANES);
    return 4 * (2 * x.longest * (keys + values) + 2 * keys) + 4 * 64;
  }
  Written(const Arguments& x, Scratch& scratch)
      : key_width(round_up(x.channels, LANES)), value_width(round_up(x.width, LANES)),
        keys(scratch.take(2 * x.longest * key_width)), values(scratch.take(2 * x.longest * value_width)),
        decay(scratch.take(key_width)) {}

  void put(const Arguments& x, const Tensor& k, const Tensor& v, int64_t n, int64_t node, int64_t k_head, int64_t head) {
    float* key = keys + rows * key_width;
    with_type(k, [&](auto number) {
      using Number = decltype(number);
      for (int64_t c = 0; c < key_width; c += LANES)
        store(key + c, load_some(k.at<Number>(n, node, k_head) + c, x.channels - c) * load(decay + c));
    });
    with_type(v, [&](auto number) {
      using Number = decltype(number);
      for (int64_t c = 0; c < value_width; c += LANES)
        store(values + rows * value_width + c, load_some(v.at<Number>(n, node, head) + c, x.width - c));
    });
    rows++;
  }

  void fade(const Tensor& g, int64_t n, int64_t node, int64_t head, const Arguments& x) {
    with_type(g, [&](auto number) {
      using Number = decltype(number);
      const Number* from = g.at<Number>(n, node, head);
      for (int64_t c = 0; c < key_width; c += LANES) {
        Vec by = x.channels_decay ? load_some(from + c, x.channels - c) : broadcast(widen(*from));
        store(decay + c, load(decay + c) * exp(by));
      }
    });
  }
};

// One row of the state: N vectors of its values from `c` on.
template <int N>
INLINE void row(const Arguments& x, const Written& written, int64_t k, int64_t c, const float* from, float* to) {
  Vec sum[N];
  const Vec decay = broadcast(written.decay[k]);
  for (int i = 0; i < N; i++) sum[i] = load_some(from + c + i * LANES, x.width - c - i * LANES) * decay;
  for (int64_t j = written.rows - 1; j >= 0; j--)
    for (int i = 0; i < N; i++)
      sum[i] += written.keys[j * written.key_width + k] * load(written.values + j * written.value_width + c + i * LANES);
  for (int i = 0; i < N; i++) store_some(to + c + i * LANES, sum[i], x.width - c - i * LANES);
}

void unit(const Arguments& x, Written written, int64_t n, int64_t head) {
  const int64_t* path = x.paths.at<int64_t>(n);
  const int64_t step = x.paths.stride[1];
  int64_t nodes = 0;
  while (nodes < x.longest && path[nodes * step] >= 0) nodes++;
  for (int64_t c = 0; c < written.key_width; c += LANES) store(written.decay + c, broadcast(1.0f));
  for (int64_t i = nodes - 1; i >= 0; i--) {
    int64_t node = path[i * step];
    written.put(x, x.keys, x.values, n, node, head * x.heads_of_keys / x.heads, head);
    if (x.other_keys)
      written.put(x, x.other_keys, x.other_values, n, node, head * x.heads_of_others / x.heads, head);
    if (x.log_decay) written.fade(x.log_decay, n, node, head, x);
  }
  for (int64_t k = 0; k < x.channels; k++) {
    const float* from = x.state.at<float>(n, head, k);
    float* to = x.new_state.at<float>(n, head, k);
    int64_t c = 0;
    for (; c + TILE_VECTORS * LANES <= written.value_width; c += TILE_VECTORS * LANES)
      row<TILE_VECTORS>(x, written, k, c, from, to);
    for (; c < written.value_width; c += LANES) row<1>(x, written, k, c, from, to);
  }
  if (!x.total) return;
  for (int64_t c = 0; c < written.key_width; c += LANES) {
    Vec sum = load_some(x.total.at<float>(n, head) + c, x.channels - c) * load(written.decay + c);
    for (int64_t j = written.rows - 1; j >= 0; j--) sum += load(written.keys + j * written.key_width + c);
    store_some(x.new_total.at<float>(n, head) + c, sum, x.channels - c);
  }
}

}  // namespace

KERNEL(tree_commit, Arguments) {
  const Arguments& x = arguments;
  const int64_t units = x.sequences * x.heads;
  parallel_if_much(units, units * x.channels * x.width * (2 + x.longest), [&](int64_t begin, int64_t end) {
    Scratch scratch(Written::bytes(x));
    Written written(x, scratch);
    for (int64_t i = begin; i < end; i++) unit(x, written, i / x.heads, i % x.heads);
  });
}

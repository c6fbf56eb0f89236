// What stands between the products of a layer: RMS norm, gates, rotation of pairs, cross entropy; forward and backward.
//
// A row is read and written once or twice and stays in the cache in between. Gradients of weights, which all rows share, are
// summed in a fixed number of groups of rows, and the groups by the caller.
#include <algorithm>
#include <cmath>

#include "arguments.h"
#include "parallel.h"

namespace {

// Visits(first, count) for the vectors of a row of `size` numbers.
template <class Visit>
INLINE void for_vectors(int64_t size, Visit visit) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) visit(i, int64_t(LANES));
  if (i < size) visit(i, size - i);
}

// visit(a, b, ...) with a number of each tensor's type.
template <class Visit>
INLINE void with_types(const Tensor& a, const Tensor& b, Visit visit) {
  with_type(a, [&](auto x) { with_type(b, [&](auto y) { visit(x, y); }); });
}
template <class Visit>
INLINE void with_types(const Tensor& a, const Tensor& b, const Tensor& c, Visit visit) {
  with_types(a, b, [&](auto x, auto y) { with_type(c, [&](auto z) { visit(x, y, z); }); });
}

// ---------------------------------------------------------------------------------------------------------------------
// y = x r w with r = 1 / sqrt(mean(x^2) + eps)
//   u = dy w,  dx = r u - x r^3 (u . x) / D,  dw = sum over rows of dy x r

struct RmsNorm {
  Tensor x, weight;  // [R, D]; [heads, D] or none: row i has the weight i mod heads
  Tensor y, inverse;  // [R, D], [R]
  int64_t rows, size, heads;
  double eps;
};

struct RmsNormBackward {
  Tensor x, weight, inverse, d_y;
  Tensor d_x, d_weight;  // [R, D]; [groups, heads, D] or none
  int64_t rows, size, heads, groups;
};

template <class Given, class Made>
void norm_row(const RmsNorm& n, int64_t i) {
  const Given* x = n.x.at<Given>(i);
  const float* weight = n.weight ? n.weight.at<float>(i % n.heads) : nullptr;
  Vec squares = zeros();
  for_vectors(n.size, [&](int64_t at, int64_t count) {
    Vec part = load_some(x + at, count);
    squares += part * part;
  });
  float inverse = 1.0f / std::sqrt(sum(squares) / float(n.size) + float(n.eps));
  *n.inverse.at<float>(i) = inverse;
  Made* y = n.y.at<Made>(i);
  for_vectors(n.size, [&](int64_t at, int64_t count) {
    Vec part = load_some(x + at, count) * inverse;
    if (weight) part *= load_some(weight + at, count);
    store_some(y + at, part, count);
  });
}

template <class Given, class Slope>
void norm_row_backward(const RmsNormBackward& n, int64_t i, int64_t group) {
  const Given* x = n.x.at<Given>(i);
  const Slope* d_y = n.d_y.at<Slope>(i);
  const float* weight = n.weight ? n.weight.at<float>(i % n.heads) : nullptr;
  float* d_weight = n.d_weight ? n.d_weight.at<float>(group, i % n.heads) : nullptr;
  float inverse = *n.inverse.at<float>(i);
  Vec products = zeros();
  for_vectors(n.size, [&](int64_t at, int64_t count) {
    Vec part = load_some(x + at, count), slope = load_some(d_y + at, count);
    if (d_weight) store_some(d_weight + at, load_some(d_weight + at, count) + slope * part * inverse, count);
    products += part * (weight ? slope * load_some(weight + at, count) : slope);
  });
  float pull = sum(products) / float(n.size) * inverse * inverse * inverse;
  Given* d_x = n.d_x.at<Given>(i);
  for_vectors(n.size, [&](int64_t at, int64_t count) {
    Vec slope = load_some(d_y + at, count);
    if (weight) slope *= load_some(weight + at, count);
    store_some(d_x + at, slope * inverse - load_some(x + at, count) * pull, count);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// y = silu(gate) x,  silu(g) = g s(g):  dx = dy g s,  dgate = dy x s (1 + g (1 - s))

struct Gate {
  Tensor gate, x, y;  // [R, D]
  int64_t rows, size;
};

struct GateBackward {
  Tensor gate, x, d_y, d_gate, d_x;
  int64_t rows, size;
};

// ---------------------------------------------------------------------------------------------------------------------
// Pairs of channels i and i + K / 2, turned by their token's angles; the gradient is turned back (sign -1).

struct Turn {
  Tensor x, cos, sin, y;  // [B, T, H, K]; [B or 1, T, K / 2] twice
  int64_t rows, length, heads, half;
  double sign;
};

template <class Number, class Angle>
void turn_token(const Turn& t, int64_t row, int64_t token) {
  const Angle* cos = t.cos.at<Angle>(row, token);
  const Angle* sin = t.sin.at<Angle>(row, token);
  float sign = float(t.sign);
  for (int64_t head = 0; head < t.heads; head++) {
    const Number* x = t.x.at<Number>(row, token, head);
    Number* y = t.y.at<Number>(row, token, head);
    for_vectors(t.half, [&](int64_t at, int64_t count) {
      Vec c = load_some(cos + at, count), s = load_some(sin + at, count) * sign;
      Vec left = load_some(x + at, count), right = load_some(x + t.half + at, count);
      store_some(y + at, left * c - right * s, count);
      store_some(y + t.half + at, right * c + left * s, count);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// loss = ln(sum e^logits) - logits[target]; the gradient softmax - onehot(target) takes the place of the logits.
// A target below 0 has loss and gradient 0.

struct CrossEntropy {
  Tensor logits, bias, targets, loss;  // [R, C]; [C] float32 or none; [R]; [R]
  int64_t rows, classes;
};

template <class Number>
void cross_entropy_row(const CrossEntropy& c, int64_t i, float* exponentials) {
  Number* logits = c.logits.at<Number>(i);
  int64_t target = *c.targets.at<int64_t>(i);
  float* loss = c.loss.at<float>(i);
  if (target < 0) {
    *loss = 0.0f;
    for_vectors(c.classes, [&](int64_t at, int64_t count) { store_some(logits + at, zeros(), count); });
    return;
  }
  auto logit = [&](int64_t at, int64_t count) {
    Vec x = load_some(logits + at, count);
    return c.bias ? x + load_some(c.bias.at<float>(at), count) : x;
  };
  const float lowest = -__builtin_inff();
  Vec tops = broadcast(lowest);
  for_vectors(c.classes, [&](int64_t at, int64_t count) {
    Vec x = logit(at, count);
    tops = max(lane_numbers() < int32_t(count) ? x : broadcast(lowest), tops);
    store(exponentials + at, x);
  });
  float top = largest(tops), wanted = exponentials[target];
  Vec sums = zeros();
  for_vectors(c.classes, [&](int64_t at, int64_t count) {
    Vec e = exp(load(exponentials + at) - top);
    e = lane_numbers() < int32_t(count) ? e : zeros();
    store(exponentials + at, e);
    sums += e;
  });
  float total = sum(sums);
  *loss = std::log(total) + (top - wanted);
  for_vectors(c.classes, [&](int64_t at, int64_t count) {
    store_some(logits + at, load(exponentials + at) / total, count);
  });
  narrow(exponentials[target] / total - 1.0f, logits + target);
}

}  // namespace

KERNEL(rms_norm_forward, RmsNorm) {
  with_types(arguments.x, arguments.y, [&](auto given, auto made) {
    parallel_ranges(arguments.rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) norm_row<decltype(given), decltype(made)>(arguments, i);
    });
  });
}

KERNEL(rms_norm_backward, RmsNormBackward) {
  const RmsNormBackward& n = arguments;
  with_types(n.x, n.d_y, [&](auto given, auto slope) {
    parallel_ranges(n.groups, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; group++) {
        if (n.d_weight) std::fill_n(n.d_weight.at<float>(group), n.heads * n.size, 0.0f);
        for (int64_t i = n.rows * group / n.groups; i < n.rows * (group + 1) / n.groups; i++)
          norm_row_backward<decltype(given), decltype(slope)>(n, i, group);
      }
    });
  });
}

KERNEL(swiglu_forward, Gate) {
  const Gate& g = arguments;
  with_types(g.gate, g.x, [&](auto of_gate, auto of_x) {
    parallel_ranges(g.rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const auto* gate = g.gate.at<decltype(of_gate)>(i);
        const auto* x = g.x.at<decltype(of_x)>(i);
        auto* y = g.y.at<decltype(of_x)>(i);
        for_vectors(g.size, [&](int64_t at, int64_t count) {
          Vec part = load_some(gate + at, count);
          store_some(y + at, part * sigmoid(part) * load_some(x + at, count), count);
        });
      }
    });
  });
}

KERNEL(swiglu_backward, GateBackward) {
  const GateBackward& g = arguments;
  with_types(g.gate, g.x, g.d_y, [&](auto of_gate, auto of_x, auto of_d_y) {
    parallel_ranges(g.rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const auto* gate = g.gate.at<decltype(of_gate)>(i);
        const auto* x = g.x.at<decltype(of_x)>(i);
        const auto* d_y = g.d_y.at<decltype(of_d_y)>(i);
        auto* d_gate = g.d_gate.at<decltype(of_gate)>(i);
        auto* d_x = g.d_x.at<decltype(of_x)>(i);
        for_vectors(g.size, [&](int64_t at, int64_t count) {
          Vec part = load_some(gate + at, count), slope = load_some(d_y + at, count), open = sigmoid(part);
          store_some(d_x + at, slope * part * open, count);
          store_some(d_gate + at, slope * load_some(x + at, count) * open * (1.0f + part * (1.0f - open)), count);
        });
      }
    });
  });
}

KERNEL(turn, Turn) {
  with_types(arguments.x, arguments.cos, [&](auto number, auto angle) {
    parallel_ranges(arguments.rows * arguments.length, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        turn_token<decltype(number), decltype(angle)>(arguments, i / arguments.length, i % arguments.length);
    });
  });
}

KERNEL(cross_entropy, CrossEntropy) {
  with_type(arguments.logits, [&](auto number) {
    parallel_ranges(arguments.rows, [&](int64_t begin, int64_t end) {
      int64_t padded = round_up(arguments.classes, LANES);
      Scratch scratch(padded * int64_t(sizeof(float)));
      float* exponentials = scratch.take(padded);
      for (int64_t i = begin; i < end; i++) cross_entropy_row<decltype(number)>(arguments, i, exponentials);
    });
  });
}

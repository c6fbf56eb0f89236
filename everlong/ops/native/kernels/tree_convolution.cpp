// A short convolution over a tree of inputs, y = act(bias + sum_i w_i x_i): the i-th ancestor meets the i-th last tap,
// and beyond the first node of a path stands the end of the state.
//
// A unit of work is a range of neighbouring channels of all sequences.
#include <algorithm>

#include "trees.h"

namespace {

struct Arguments {
  Tensor x, weight, bias, state, parents;  // [B, T, D], [D, W], [D] or none, [B, W - 1, D], [T]
  Tensor y;                                // [B, T, D]
  int64_t sequences, length, channels, taps, activated;
};

constexpr int64_t WIDEST = 256;  // channels of a range

// y of one node and LANES channels from `c` on, `some` of which there are; `taps` [W, WIDEST] are those of the range.
template <class Number>
INLINE void convolve(const Arguments& x, int64_t n, int64_t node, int64_t c, int64_t some, const float* taps, Vec sum) {
  const int64_t* parents = x.parents.at<int64_t>();
  int64_t back = 0;
  for (int64_t source = node; source >= 0 && back < x.taps; source = parents[source], back++)
    sum += load(taps + (x.taps - 1 - back) * WIDEST) * load_some(x.x.at<Number>(n, source, c), some);
  for (int64_t row = x.taps - 2; back < x.taps; row--, back++)
    sum += load(taps + (x.taps - 1 - back) * WIDEST) * load_some(x.state.at<float>(n, row, c), some);
  store_some(x.y.at<Number>(n, node, c), x.activated ? sum * sigmoid(sum) : sum, some);
}

template <class Number>
void range(const Arguments& x, int64_t first, int64_t count) {
  Scratch scratch((x.taps + 1) * WIDEST * 4);
  float *taps = scratch.take(x.taps * WIDEST), *bias = scratch.take(WIDEST);
  for (int64_t tap = 0; tap < x.taps; tap++)
    read(taps + tap * WIDEST, x.weight, first * x.weight.stride[0] + tap * x.weight.stride[1], count, x.weight.stride[0]);
  if (x.bias) read(bias, x.bias, first * x.bias.stride[0], count, x.bias.stride[0]);
  for (int64_t n = 0; n < x.sequences; n++)
    for (int64_t node = 0; node < x.length; node++)
      for (int64_t i = 0; i < count; i += LANES)
        convolve<Number>(x, n, node, first + i, count - i, taps + i, x.bias ? load(bias + i) : zeros());
}

}  // namespace

KERNEL(tree_convolution, Arguments) {
  const Arguments& x = arguments;
  const int64_t vectors = (x.channels + LANES - 1) / LANES;
  // An activation takes as long as so many taps.
  const int64_t operations = x.sequences * x.length * x.channels * (x.taps + (x.activated ? 32 : 0));
  with_type(x.x, [&](auto number) {
    using Number = decltype(number);
    parallel_if_much(vectors, operations, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * LANES; first < end * LANES; first += WIDEST)
        range<Number>(x, first, std::min({first + WIDEST, end * LANES, x.channels}) - first);
    });
  });
}

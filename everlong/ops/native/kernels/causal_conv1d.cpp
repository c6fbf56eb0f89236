// y_t = act(sum_t), sum_t = bias + sum_i w_i x_{t-W+1+i} for each channel, and its gradients: with g_t that of sum_t,
//
//     dw_i = sum_t g_t x_{t-W+1+i}        db = sum_t g_t        dx_s = sum_i w_i g_{s+W-1-i}
//
// Inputs are counted from the oldest in the state: output t sees the inputs t .. t+W-1, and input p was seen by the
// outputs p-W+1 .. p. So both passes go once through time, with the last W rows of inputs (and of g) in the cache.
#include "arguments.h"
#include "channels.h"

namespace {

constexpr int64_t WIDEST = 512;  // channels of a range: all rows that are in use stay in the first cache
constexpr int USUAL = 4;         // taps, for which the loops are unrolled

struct Forward {
  Tensor x, weight, bias, state, cu_seqlens;  // [B, T, D], [D, W], [D] or none, [S, W - 1, D], [S + 1] or none
  Tensor y, last;
  int64_t sequences, length, channels, taps, silu;

  bool is_large() const { return (cu_seqlens ? 1 : sequences) * length * channels >= LARGE; }
};

struct Backward {
  Tensor x, weight, bias, state, cu_seqlens, d_y, d_last;
  Tensor d_x, d_weight, d_bias, d_state;
  Tensor by_sequence;  // what weight and bias receive from each sequence, [S, W + 1, D]
  int64_t sequences, length, channels, taps, silu;

  bool is_large() const { return (cu_seqlens ? 1 : sequences) * length * channels >= LARGE; }
};

// A range of channels of one sequence: its weights, and its last W inputs.
struct Window {
  int64_t taps, count, width;  // width: of a row, `count` rounded up
  float *weights, *bias, *rows;

  static int64_t size(int64_t taps, int64_t count) { return (2 * taps + 1) * round_up(count, LANES); }
  template <class Arguments>
  Window(const Arguments& x, Scratch& scratch, int64_t n, int64_t channel, int64_t count)
      : taps(x.taps), count(count), width(round_up(count, LANES)) {
    weights = scratch.take(taps * width);
    bias = scratch.take(width);
    rows = scratch.take(taps * width);
    std::fill_n(weights, size(taps, count), 0.0f);
    for (int64_t i = 0; i < taps; i++) {
      const Tensor& w = x.weight;
      read(weights + i * width, w, channel * w.stride[0] + i * w.stride[1], count, w.stride[0]);
    }
    if (x.bias) read(bias, x.bias, channel * x.bias.stride[0], count, x.bias.stride[0]);
    for (int64_t p = 0; p < taps - 1; p++)
      std::copy_n(x.state.template at<float>(n, p, channel), count, rows + p * width);
  }
  float* row(int64_t input) const { return rows + input % taps * width; }
};

// The sums of the output t for the channels i and after. `x` are those of its newest input, t + TAPS - 1.
template <int TAPS>
INLINE Vec weighted(const Window& window, const float* const* inputs, Vec x, int64_t i) {
  const int64_t taps = TAPS ? TAPS : window.taps;
  Vec sum = load(window.bias + i) + x * load(window.weights + (taps - 1) * window.width + i);
#pragma GCC unroll 8
  for (int64_t tap = 0; tap < taps - 1; tap++)
    sum += load(inputs[tap] + i) * load(window.weights + tap * window.width + i);
  return sum;
}

template <int TAPS, class Number>
void forward(const Forward& x, int64_t n, int64_t channel, int64_t count) {
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  Scratch scratch(4 * Window::size(x.taps, count) + 8 * x.taps + 4 * 64);
  Window window(x, scratch, n, channel, count);
  float** inputs = scratch.take<float*>(x.taps);
  for (int64_t t = s.start; t < s.stop; t++) {
    for (int64_t tap = 0; tap < x.taps; tap++) inputs[tap] = window.row(t - s.start + tap);
    float* newest = inputs[x.taps - 1];
    const Number* from = x.x.at<Number>(s.row, t, channel);
    Row<Number> to(x.y.at<Number>(s.row, t, channel), x.is_large());
    for_vectors(count, [&](int64_t i, int64_t some) {
      Vec in = load_some(from + i, some);
      store(newest + i, in);
      Vec sum = weighted<TAPS>(window, inputs, in, i);
      to.put(i, x.silu ? sum * sigmoid(sum) : sum, some);
    });
  }
  end_streams();
  for (int64_t p = 0; p < x.taps - 1; p++)
    std::copy_n(window.row(s.stop - s.start + p), count, x.last.at<float>(n, p, channel));
}

template <int TAPS, class Number>
void backward(const Backward& x, int64_t n, int64_t channel, int64_t count) {
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  const int64_t length = s.stop - s.start, taps = TAPS ? TAPS : x.taps, width = round_up(count, LANES);
  Scratch scratch(4 * (Window::size(taps, count) + (2 * taps + 1) * width) + 16 * taps + 6 * 64);
  Window window(x, scratch, n, channel, count);
  float *d_sums = scratch.take(taps * width), *d_weights = scratch.take((taps + 1) * width),
        *d_bias = d_weights + taps * width;
  float **inputs = scratch.take<float*>(taps), **gradients = scratch.take<float*>(taps);
  std::fill_n(d_weights, (taps + 1) * width, 0.0f);
  // What input p receives: from the outputs p - tap for the taps of a range, and from the last state.
  auto receive = [&](int64_t p, int64_t first, int64_t stop) __attribute__((always_inline)) {
    for (int64_t tap = first; tap < stop; tap++) gradients[tap] = d_sums + (p - tap) % taps * width;
    const float* beyond = p < length ? nullptr : x.d_last.at<float>(n, p - length, channel);
    auto total = [&](int64_t i, int64_t some) {
      Vec sum = beyond ? load_some(beyond + i, some) : zeros();
#pragma GCC unroll 8
      for (int64_t tap = first; tap < stop; tap++)
        sum += load(gradients[tap] + i) * load(window.weights + tap * width + i);
      return sum;
    };
    if (p < taps - 1) {
      float* to = x.d_state.at<float>(n, p, channel);
      for_vectors(count, [&](int64_t i, int64_t some) { store_some(to + i, total(i, some), some); });
    } else {
      Row<Number> to(x.d_x.at<Number>(s.row, s.start + p - (taps - 1), channel), x.is_large());
      for_vectors(count, [&](int64_t i, int64_t some) { to.put(i, total(i, some), some); });
    }
  };
  for (int64_t t = 0; t < length; t++) {
    for (int64_t tap = 0; tap < taps; tap++) inputs[tap] = window.row(t + tap);
    float *newest = inputs[taps - 1], *d_sum = d_sums + t % taps * width;
    const Number *from = x.x.at<Number>(s.row, s.start + t, channel),
                 *d_y = x.d_y.at<Number>(s.row, s.start + t, channel);
    for_vectors(count, [&](int64_t i, int64_t some) {
      Vec in = load_some(from + i, some), g = load_some(d_y + i, some);
      store(newest + i, in);
      if (x.silu) {
        Vec sum = weighted<TAPS>(window, inputs, in, i), open = sigmoid(sum);
        g *= open * (1.0f + sum * (1.0f - open));
      }
      store(d_sum + i, g);
      store(d_bias + i, load(d_bias + i) + g);
#pragma GCC unroll 8
      for (int64_t tap = 0; tap < taps; tap++) {
        float* to = d_weights + tap * width + i;
        store(to, load(to) + g * load(inputs[tap] + i));
      }
    });
    t < taps - 1 ? receive(t, 0, t + 1) : receive(t, 0, taps);
  }
  for (int64_t p = length; p < length + taps - 1; p++) receive(p, p - length + 1, std::min(p + 1, taps));
  end_streams();
  for (int64_t tap = 0; tap <= taps; tap++)
    std::copy_n(d_weights + tap * width, count, x.by_sequence.at<float>(n, tap, channel));
}

// What the weights and the bias of a range receive from all sequences.
void sum_sequences(const Backward& x, int64_t channel, int64_t count) {
  Scratch scratch(4 * count);
  float* total = scratch.take(count);
  for (int64_t tap = 0; tap <= x.taps; tap++) {
    std::fill_n(total, count, 0.0f);
    for (int64_t n = 0; n < x.sequences; n++) {
      const float* part = x.by_sequence.at<float>(n, tap, channel);
      for (int64_t i = 0; i < count; i++) total[i] += part[i];
    }
    if (tap < x.taps) {
      const Tensor& to = x.d_weight;
      write(to, channel * to.stride[0] + tap * to.stride[1], total, count, to.stride[0]);
    } else if (x.bias) {
      write(x.d_bias, channel, total, count, 1);
    }
  }
}

}  // namespace

KERNEL(causal_conv1d_forward, Forward) {
  with_type(arguments.x, [&](auto number) {
    using Number = decltype(number);
    auto run = arguments.taps == USUAL ? forward<USUAL, Number> : forward<0, Number>;
    for_channels(arguments.sequences, arguments.channels, WIDEST,
                 [&](int64_t n, int64_t first, int64_t count) { run(arguments, n, first, count); });
  });
}

KERNEL(causal_conv1d_backward, Backward) {
  with_type(arguments.x, [&](auto number) {
    using Number = decltype(number);
    auto run = arguments.taps == USUAL ? backward<USUAL, Number> : backward<0, Number>;
    for_channels(arguments.sequences, arguments.channels, WIDEST,
                 [&](int64_t n, int64_t first, int64_t count) { run(arguments, n, first, count); });
  });
  for_channels(1, arguments.channels, WIDEST,
               [&](int64_t, int64_t first, int64_t count) { sum_sequences(arguments, first, count); });
}

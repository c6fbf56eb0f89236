// h_t = a_t h_{t-1} + b_t for each channel, real or complex, and its gradients.
//
// A unit of work is one sequence and LANES channels: a vector (for complex numbers a pair of them) runs along time.
// Backwards d_t = g_t + conj(a_{t+1}) d_{t+1}, with g the gradient of h_t: db_t = d_t, da_t = d_t conj(h_{t-1}).
#include "arguments.h"
#include "parallel.h"

#include <algorithm>

namespace {

// Real numbers, one lane each.
struct Real {
  Vec re;
  static INLINE Real nothing() { return {zeros()}; }
  template <class Number>
  static INLINE Real load(const Number* from, int64_t count) {
    return {load_some(from, count)};
  }
  template <class Number>
  INLINE void store(Number* to, int64_t count) const {
    store_some(to, re, count);
  }
  INLINE Real conjugate() const { return *this; }
  friend INLINE Real operator*(Real x, Real y) { return {x.re * y.re}; }
  friend INLINE Real operator+(Real x, Real y) { return {x.re + y.re}; }
};

// Complex numbers, stored as pairs: half as many as lanes.
struct Complex {
  Vec pairs;  // re, im, re, im, ...
  static INLINE Complex nothing() { return {zeros()}; }
  template <class Number>
  static INLINE Complex load(const Number* from, int64_t count) {
    return {load_some(from, count)};
  }
  template <class Number>
  INLINE void store(Number* to, int64_t count) const {
    store_some(to, pairs, count);
  }
  static INLINE Vec signs() { return (lane_numbers() & 1) != 0 ? broadcast(1.0f) : broadcast(-1.0f); }
  static INLINE Vec reals(Vec x) { return (lane_numbers() & 1) != 0 ? lanes::All::swapped<1>(x) : x; }
  static INLINE Vec imaginaries(Vec x) { return (lane_numbers() & 1) != 0 ? x : lanes::All::swapped<1>(x); }
  INLINE Complex conjugate() const { return {pairs * -signs()}; }
  friend INLINE Complex operator*(Complex x, Complex y) {
    return {reals(x.pairs) * y.pairs + imaginaries(x.pairs) * signs() * lanes::All::swapped<1>(y.pairs)};
  }
  friend INLINE Complex operator+(Complex x, Complex y) { return {x.pairs + y.pairs}; }
};

struct Forward {
  Tensor a, b, state, cu_seqlens;  // [B, T, numbers] twice, [N, numbers], [N + 1] or none; a complex number is two
  Tensor h, last;
  int64_t sequences, length, numbers, complex;
};

struct Backward {
  Tensor a, h, state, cu_seqlens, d_h, d_last;
  Tensor d_a, d_b, d_state;
  int64_t sequences, length, numbers, complex;
};

template <class Value, class Number>
void scan(const Forward& x, int64_t n, int64_t first) {
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  int64_t count = std::min<int64_t>(LANES, x.numbers - first);
  Value h = Value::load(x.state.at<float>(n, first), count);
  for (int64_t t = s.start; t < s.stop; t++) {
    h = Value::load(x.a.at<Number>(s.row, t, first), count) * h + Value::load(x.b.at<Number>(s.row, t, first), count);
    h.store(x.h.at<Number>(s.row, t, first), count);
  }
  h.store(x.last.at<float>(n, first), count);
}

template <class Value, class Number>
void scan_backward(const Backward& x, int64_t n, int64_t first) {
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  int64_t count = std::min<int64_t>(LANES, x.numbers - first);
  Value d = Value::load(x.d_last.at<float>(n, first), count);
  for (int64_t t = s.stop - 1; t >= s.start; t--) {
    d = d + Value::load(x.d_h.at<Number>(s.row, t, first), count);
    Value before = t > s.start ? Value::load(x.h.at<Number>(s.row, t - 1, first), count)
                               : Value::load(x.state.at<float>(n, first), count);
    (d * before.conjugate()).store(x.d_a.at<Number>(s.row, t, first), count);
    d.store(x.d_b.at<Number>(s.row, t, first), count);
    d = Value::load(x.a.at<Number>(s.row, t, first), count).conjugate() * d;
  }
  d.store(x.d_state.at<float>(n, first), count);
}

// run(n, first number of the vector) for all sequences and channels.
template <class Run>
void for_units(int64_t sequences, int64_t numbers, Run run) {
  int64_t vectors = (numbers + LANES - 1) / LANES;
  parallel_ranges(sequences * vectors, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) run(unit / vectors, unit % vectors * LANES);
  });
}

}  // namespace

KERNEL(linear_scan_forward, Forward) {
  with_type(arguments.b, [&](auto number) {
    using Number = decltype(number);
    for_units(arguments.sequences, arguments.numbers, [&](int64_t n, int64_t first) {
      arguments.complex ? scan<Complex, Number>(arguments, n, first) : scan<Real, Number>(arguments, n, first);
    });
  });
}

KERNEL(linear_scan_backward, Backward) {
  with_type(arguments.h, [&](auto number) {
    using Number = decltype(number);
    for_units(arguments.sequences, arguments.numbers, [&](int64_t n, int64_t first) {
      arguments.complex ? scan_backward<Complex, Number>(arguments, n, first)
                        : scan_backward<Real, Number>(arguments, n, first);
    });
  });
}

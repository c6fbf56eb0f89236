// h_t = a_t h_{t-1} + b_t for each channel, real or complex, and its gradients.
//
// A unit of work is a range of channels of one sequence, which runs along time: it is read and written once, in long
// rows. Backwards d_t = g_t + conj(a_{t+1}) d_{t+1}, with g the gradient of h_t: db_t = d_t, da_t = d_t conj(h_{t-1}).
#include "arguments.h"
#include "channels.h"

namespace {

// Real numbers, one lane each.
struct Real {
  Vec numbers;
  static INLINE Real nothing() { return {zeros()}; }
  template <class Number>
  static INLINE Real load(const Number* from, int64_t count) {
    return {load_some(from, count)};
  }
  INLINE Real conjugate() const { return *this; }
  friend INLINE Real operator*(Real x, Real y) { return {x.numbers * y.numbers}; }
  friend INLINE Real operator+(Real x, Real y) { return {x.numbers + y.numbers}; }
};

// Complex numbers, stored as pairs: half as many as lanes.
struct Complex {
  Vec numbers;  // re, im, re, im, ...
  static INLINE Complex nothing() { return {zeros()}; }
  template <class Number>
  static INLINE Complex load(const Number* from, int64_t count) {
    return {load_some(from, count)};
  }
  static INLINE Vec signs() { return (lane_numbers() & 1) != 0 ? broadcast(1.0f) : broadcast(-1.0f); }
  static INLINE Vec reals(Vec x) { return (lane_numbers() & 1) != 0 ? lanes::All::swapped<1>(x) : x; }
  static INLINE Vec imaginaries(Vec x) { return (lane_numbers() & 1) != 0 ? x : lanes::All::swapped<1>(x); }
  INLINE Complex conjugate() const { return {numbers * -signs()}; }
  friend INLINE Complex operator*(Complex x, Complex y) {
    return {reals(x.numbers) * y.numbers + imaginaries(x.numbers) * signs() * lanes::All::swapped<1>(y.numbers)};
  }
  friend INLINE Complex operator+(Complex x, Complex y) { return {x.numbers + y.numbers}; }
};

struct Forward {
  Tensor a, b, state, cu_seqlens;  // [B, T, numbers] twice, [N, numbers], [N + 1] or none; a complex number is two
  Tensor h, last;
  int64_t sequences, length, numbers, complex;

  bool is_large() const { return (cu_seqlens ? 1 : sequences) * length * numbers >= LARGE; }
};

struct Backward {
  Tensor a, h, state, cu_seqlens, d_h, d_last;
  Tensor d_a, d_b, d_state;
  int64_t sequences, length, numbers, complex;

  bool is_large() const { return (cu_seqlens ? 1 : sequences) * length * numbers >= LARGE; }
};

constexpr int64_t WIDEST = 1024;  // numbers of a range: the states of all of them stay in the first cache

// As `for_vectors`, from the last to the first: who walks back in time reads memory backwards throughout.
template <class Visit>
INLINE void for_vectors_backwards(int64_t count, Visit visit) {
  int64_t i = count / LANES * LANES;
  if (i < count) visit(i, count - i);
  while ((i -= LANES) >= 0) visit(i, LANES);
}

template <class Value, class Number>
void scan(const Forward& x, int64_t n, int64_t first, int64_t count) {
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  Scratch scratch(WIDEST * 4);
  float* states = scratch.take(WIDEST);
  for_vectors(count,
              [&](int64_t i, int64_t some) { store(states + i, load_some(x.state.at<float>(n, first + i), some)); });
  for (int64_t t = s.start; t < s.stop; t++) {
    const Number *a = x.a.at<Number>(s.row, t, first), *b = x.b.at<Number>(s.row, t, first);
    Row<Number> to(x.h.at<Number>(s.row, t, first), x.is_large());
    for_vectors(count, [&](int64_t i, int64_t some) {
      Value h = Value::load(a + i, some) * Value::load(states + i, LANES) + Value::load(b + i, some);
      store(states + i, h.numbers);
      to.put(i, h.numbers, some);
    });
  }
  end_streams();
  for_vectors(count,
              [&](int64_t i, int64_t some) { store_some(x.last.at<float>(n, first + i), load(states + i), some); });
}

template <class Value, class Number>
void scan_backward(const Backward& x, int64_t n, int64_t first, int64_t count) {
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  Scratch scratch(WIDEST * 4);
  float* carried = scratch.take(WIDEST);  // conj(a_{t+1}) d_{t+1}
  for_vectors(count,
              [&](int64_t i, int64_t some) { store(carried + i, load_some(x.d_last.at<float>(n, first + i), some)); });
  auto step = [&](int64_t t, const auto* before) {
    const Number *a = x.a.at<Number>(s.row, t, first), *d_h = x.d_h.at<Number>(s.row, t, first);
    Row<Number> d_a(x.d_a.at<Number>(s.row, t, first), x.is_large()),
        d_b(x.d_b.at<Number>(s.row, t, first), x.is_large());
    for_vectors_backwards(count, [&](int64_t i, int64_t some) {
      Value d = Value::load(carried + i, LANES) + Value::load(d_h + i, some);
      d_a.put(i, (d * Value::load(before + i, some).conjugate()).numbers, some);
      d_b.put(i, d.numbers, some);
      store(carried + i, (Value::load(a + i, some).conjugate() * d).numbers);
    });
  };
  for (int64_t t = s.stop - 1; t > s.start; t--) step(t, x.h.at<Number>(s.row, t - 1, first));
  if (s.start < s.stop) step(s.start, x.state.at<float>(n, first));
  end_streams();
  for_vectors(count,
              [&](int64_t i, int64_t some) { store_some(x.d_state.at<float>(n, first + i), load(carried + i), some); });
}

}  // namespace

KERNEL(linear_scan_forward, Forward) {
  with_type(arguments.b, [&](auto number) {
    using Number = decltype(number);
    auto run = arguments.complex ? scan<Complex, Number> : scan<Real, Number>;
    for_channels(arguments.sequences, arguments.numbers, WIDEST,
                 [&](int64_t n, int64_t first, int64_t count) { run(arguments, n, first, count); });
  });
}

KERNEL(linear_scan_backward, Backward) {
  with_type(arguments.h, [&](auto number) {
    using Number = decltype(number);
    auto run = arguments.complex ? scan_backward<Complex, Number> : scan_backward<Real, Number>;
    for_channels(arguments.sequences, arguments.numbers, WIDEST,
                 [&](int64_t n, int64_t first, int64_t count) { run(arguments, n, first, count); });
  });
}

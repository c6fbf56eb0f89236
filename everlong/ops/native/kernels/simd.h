// Vectors of float32 as the processor has them, written with the compilers' own vector types: one source for AVX-512
// (16 lanes), AVX (8) and NEON or SSE (4), for GCC and Clang.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

#define INLINE inline __attribute__((always_inline))

using Vec = float __attribute__((vector_size(LANES * 4)));
using Ints = int32_t __attribute__((vector_size(LANES * 4)));  // also what a comparison gives: -1 where true
using Words = uint32_t __attribute__((vector_size(LANES * 4)));
using Halves = uint16_t __attribute__((vector_size(LANES * 2)));

// bfloat16 is the upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE Vec broadcast(float x) { return x - Vec{}; }
INLINE Vec zeros() { return Vec{}; }

INLINE Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
INLINE void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

INLINE Vec load(const bfloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
#if defined(__AVX512F__)
  // GCC 12 makes two halves of __builtin_convertvector, and without a mask it warns of its own headers.
  return (Vec)((Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x) << 16);
#else
  return (Vec)(__builtin_convertvector(x, Words) << 16);
#endif
}
// Rounds to the nearest, ties to even; NaN stays NaN.
INLINE Halves rounded(Vec x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  Words bits = (Words)x;
  Words nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Words quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? nearest : quiet, Halves);
#endif
}
INLINE void store(bfloat16* to, Vec x) {
  Halves half = rounded(x);
  std::memcpy(to, &half, sizeof half);
}

INLINE float widen(float x) { return x; }
INLINE float widen(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
INLINE void narrow(float x, float* to) { *to = x; }
INLINE void narrow(float x, bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = uint16_t(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}

// Stores past the caches, which saves reading the line first: for results too large to be found there later. `to` lies on
// a multiple of the vector's bytes, and `end_streams` comes before anybody else reads it.
INLINE void stream(float* to, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX__)
  _mm256_stream_ps(to, (__m256)x);
#else
  store(to, x);
#endif
}
INLINE void stream(bfloat16* to, Vec x) { store(to, x); }
INLINE void end_streams() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// The first `count` numbers (fewer than LANES are allowed) and zeros.
template <class Number>
INLINE Vec load_some(const Number* from, int64_t count) {
  if (count >= LANES) return load(from);
  Number some[LANES] = {};
  for (int64_t i = 0; i < count; i++) some[i] = from[i];
  return load(some);
}
template <class Number>
INLINE void store_some(Number* to, Vec x, int64_t count) {
  if (count >= LANES) return store(to, x);
  Number some[LANES];
  store(some, x);
  for (int64_t i = 0; i < count; i++) to[i] = some[i];
}

INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec select(Ints where, Vec a, Vec b) { return where ? a : b; }

namespace lanes {
template <class Sequence>
struct Of;
template <int... I>
struct Of<std::integer_sequence<int, I...>> {
  static INLINE Ints numbers() { return Ints{I...}; }
  // Lanes without the bit `S` from a, the others from b's lanes without it; and the other way round.
  template <int S>
  static INLINE Vec evens(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, ((I & S) ? LANES + I - S : I)...);
  }
  template <int S>
  static INLINE Vec odds(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, ((I & S) ? LANES + I : I + S)...);
  }
  template <int S>
  static INLINE Vec swapped(Vec a) {
    return __builtin_shufflevector(a, a, (I ^ S)...);
  }
};
using All = Of<std::make_integer_sequence<int, LANES>>;
}  // namespace lanes

// 0, 1, 2, ...
INLINE Ints lane_numbers() { return lanes::All::numbers(); }

template <int S = LANES / 2>
INLINE float sum(Vec x) {
  if constexpr (S == 0) {
    return x[0];
  } else {
    return sum<S / 2>(x + lanes::All::swapped<S>(x));
  }
}
template <int S = LANES / 2>
INLINE float largest(Vec x) {
  if constexpr (S == 0) {
    return x[0];
  } else {
    return largest<S / 2>(max(x, lanes::All::swapped<S>(x)));
  }
}

// A block of LANES x LANES, its rows and columns exchanged.
template <int S = LANES / 2>
INLINE void transpose(Vec (&rows)[LANES]) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & S) continue;
      Vec a = rows[i], b = rows[i + S];
      rows[i] = lanes::All::evens<S>(a, b);
      rows[i + S] = lanes::All::odds<S>(a, b);
    }
    transpose<S / 2>(rows);
  }
}

// Lane k of the result is the sum of rows[k], which are overwritten.
template <int S = LANES / 2>
INLINE Vec sums(Vec (&rows)[LANES]) {
  if constexpr (S == 0) {
    return rows[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < S; i++)
      rows[i] = lanes::All::evens<S>(rows[i], rows[i + S]) + lanes::All::odds<S>(rows[i], rows[i + S]);
    return sums<S / 2>(rows);
  }
}

// 2^n for whole n from -126 to 127.
INLINE Vec power_of_two(Ints n) { return (Vec)((n + 127) << 23); }

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // ln 2 in two parts, the first short

// 2^n p for whole n, also where the result overflows or vanishes.
INLINE Vec scaled(Vec p, Vec n) {
#if defined(__AVX512F__)
  // All lanes by a mask: GCC 12 warns of its own headers otherwise.
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  Vec bounded = min(max(n, broadcast(-160.0f)), broadcast(160.0f));
  Ints whole = __builtin_convertvector(bounded, Ints), half = whole >> 1;  // in two steps, which both are normal
  return p * power_of_two(half) * power_of_two(whole - half);
#endif
}
INLINE Vec to_whole(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, 0);
#else
  const float big = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  return (x + big) - big;
#endif
}
// Infinities, which would become NaN, to numbers whose power is 0 or infinite as well; NaN stays NaN.
INLINE Vec bounded(Vec x) {
#if defined(__AVX512F__)
  __m512 above = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-200.0f), (__m512)x);
  return (Vec)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(200.0f), above);
#else
  x = x < -200.0f ? broadcast(-200.0f) : x;
  return x > 200.0f ? broadcast(200.0f) : x;
#endif
}

// e^x to about 1e-7 relative; below -87 it may be 0, and is so where denormal numbers are flushed; NaN for NaN.
INLINE Vec exp(Vec x) {
  x = bounded(x);
  Vec n = to_whole(x * LOG2E);
  Vec r = (x - n * LN2_HIGH) - n * LN2_LOW;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return scaled(p * (r * r) + (r + 1.0f), n);
}

// 2^x to about 1e-7 relative, and exactly 1 at 0; otherwise as `exp`, but faster: for large x its error is that which x
// has in float32 anyway.
INLINE Vec exp2(Vec x) {
  x = bounded(x);
  Vec n = to_whole(x), r = x - n;
  Vec p = r * 1.3264754063e-3f + 9.6715122193e-3f;
  p = p * r + 5.5507336400e-2f;
  p = p * r + 2.4022242094e-1f;
  p = p * r + 6.9314697769e-1f;
  return scaled(p * r + 1.0f, n);
}

// ln x to about 1e-7 for normal x > 0; -inf at 0.
INLINE Vec log(Vec x) {
  Words bits = (Words)x;
  Ints e = (Ints)((bits - 0x3f3504f3u) >> 23);  // x = m 2^e, m from sqrt(1/2) to sqrt(2)
  e = (e << 24) >> 24;
  Vec m = (Vec)(bits - (Words)(e << 23)) - 1.0f;
  Vec p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  Vec n = __builtin_convertvector(e, Vec), square = m * m;
  Vec y = p * m * square + n * LN2_LOW;
  y = y - 0.5f * square + m + n * LN2_HIGH;
  y = x <= 0.0f ? broadcast(-__builtin_inff()) : y;
  return x == __builtin_inff() || !(x == x) ? x : y;
}

INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }
// ln(1 + e^x) to about 1e-7 relative
INLINE Vec softplus(Vec x) {
  Vec s = exp(x < 0.0f ? x : -x);  // from 0 to 1, where ln(1 + s) / s is a polynomial
  Vec p = s * 5.2324216933e-3f - 2.9504146301e-2f;
  p = p * s + 7.8224172494e-2f;
  p = p * s - 1.3663094826e-1f;
  p = p * s + 1.9105935769e-1f;
  p = p * s - 2.4842964074e-1f;
  p = p * s + 3.3319094530e-1f;
  p = p * s - 4.9999493031e-1f;
  p = p * s + 9.9999996987e-1f;
  return p * s + max(x, zeros());
}

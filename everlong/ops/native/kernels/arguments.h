// How Python calls a kernel: with one block of 8-byte words, which are the members of the kernel's struct of arguments in
// order. A tensor is six words.
#pragma once
#include <cstdint>
#include <type_traits>

#include "simd.h"

enum class Type : int64_t { none = 0, float32 = 1, bfloat16 = 2, int64 = 3, int32 = 4, boolean = 5 };

// A tensor of up to four axes; its numbers may lie anywhere. `none` where Python gave None.
struct Tensor {
  void* data;
  Type type;
  int64_t stride[4];  // in numbers

  explicit operator bool() const { return type != Type::none; }
  // From the first number to another one.
  int64_t offset(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    return i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
  }
  template <class Number>
  Number* at(int64_t i = 0, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    return static_cast<Number*>(data) + offset(i, j, k, l);
  }
};

// Where the tokens of a sequence stand: those of a row of the batch, or some of row 0 where sequences are packed.
struct Sequence {
  int64_t row, start, stop;
};
INLINE Sequence sequence_of(const Tensor& cu_seqlens, int64_t n, int64_t length) {
  if (!cu_seqlens) return {n, 0, length};
  if (cu_seqlens.type == Type::int32) {
    const int32_t* bound = cu_seqlens.at<int32_t>(n);
    return {0, bound[0], bound[cu_seqlens.stride[0]]};
  }
  const int64_t* bound = cu_seqlens.at<int64_t>(n);
  return {0, bound[0], bound[cu_seqlens.stride[0]]};
}

// visit(number) with a number of the tensor's type, float or bfloat16: `using Number = decltype(number)`.
template <class Visit>
INLINE void with_type(const Tensor& tensor, Visit visit) {
  if (tensor.type == Type::bfloat16) {
    visit(bfloat16{});
  } else {
    visit(float{});
  }
}

// Reads `count` numbers that lie `stride` apart as float32.
INLINE void read(float* to, const Tensor& from, int64_t offset, int64_t count, int64_t stride) {
  with_type(from, [&](auto number) {
    using Number = decltype(number);
    const Number* data = static_cast<const Number*>(from.data) + offset;
    if (stride == 1) {
      int64_t i = 0;
      for (; i + LANES <= count; i += LANES) store(to + i, load(data + i));
      for (; i < count; i++) to[i] = widen(data[i]);
    } else {
      for (int64_t i = 0; i < count; i++) to[i] = widen(data[i * stride]);
    }
  });
}

// Writes `count` float32 numbers to places that lie `stride` apart.
INLINE void write(const Tensor& to, int64_t offset, const float* from, int64_t count, int64_t stride) {
  with_type(to, [&](auto number) {
    using Number = decltype(number);
    Number* data = static_cast<Number*>(to.data) + offset;
    if (stride == 1) {
      int64_t i = 0;
      for (; i + LANES <= count; i += LANES) store(data + i, load(from + i));
      for (; i < count; i++) narrow(from[i], data + i);
    } else {
      for (int64_t i = 0; i < count; i++) narrow(from[i], data + i * stride);
    }
  });
}

// Defines `extern "C" int NAME(words, count)`: 0, or 1 if the words are not those of the struct, or 2 without memory.
#define KERNEL(NAME, ARGUMENTS)                                                                         \
  static void NAME##_kernel(const ARGUMENTS& arguments);                                                \
  extern "C" __attribute__((visibility("default"))) int NAME(const int64_t* words, int64_t count) {     \
    static_assert(sizeof(ARGUMENTS) % 8 == 0 && std::is_trivially_copyable_v<ARGUMENTS>);               \
    if (count * 8 != int64_t(sizeof(ARGUMENTS))) return 1;                                              \
    ARGUMENTS arguments;                                                                                \
    std::memcpy(&arguments, words, sizeof arguments);                                                   \
    try {                                                                                               \
      NAME##_kernel(arguments);                                                                         \
    } catch (const std::bad_alloc&) {                                                                   \
      return 2;                                                                                         \
    }                                                                                                   \
    return 0;                                                                                           \
  }                                                                                                     \
  static void NAME##_kernel(const ARGUMENTS& arguments)

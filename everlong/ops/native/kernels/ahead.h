// Memory that will be needed next.
#pragma once
#include "arguments.h"

// Asks for rows of tokens that come next, a few at a time between products: heads stand apart in memory, in strides that
// the processor does not foresee, and it can wait for a few lines only at the same time.
class Ahead {
  static constexpr int64_t LINE = 64;  // bytes
  struct Rows {
    const char* next;
    int64_t stride, bytes, left;
  };
  Rows tensors[8];
  int count = 0;

 public:
  // `rows` rows of `channels` numbers, from the number `offset` of x on.
  void add(const Tensor& x, int64_t offset, int64_t rows, int64_t channels) {
    if (!x) return;
    const int64_t size = x.type == Type::bfloat16 ? 2 : 4;
    tensors[count++] = {static_cast<const char*>(x.data) + offset * size, x.stride[1] * size, channels * size, rows};
  }
  INLINE void fetch_row() {
    for (int i = 0; i < count; i++) {
      Rows& x = tensors[i];
      if (x.left == 0) continue;
      for (int64_t at = 0; at < x.bytes; at += LINE) __builtin_prefetch(x.next + at, 0, 2);
      x.next += x.stride;
      x.left--;
    }
  }
};

// Memory traffic in the background of matrix products.
#pragma once
#include "arguments.h"

// Results past the caches where they are too large to be found there later.
enum class Stores { cached, streamed };

INLINE void write_row(const Tensor& to, int64_t offset, const float* from, int64_t channels, int64_t stride,
                      Stores stores) {
  float* row = static_cast<float*>(to.data) + offset;
  const bool aligned = reinterpret_cast<uintptr_t>(row) % sizeof(Vec) == 0 && channels % LANES == 0;
  if (stores == Stores::streamed && to.type == Type::float32 && stride == 1 && aligned) {
    for (int64_t c = 0; c < channels; c += LANES) stream(row + c, load(from + c));
  } else {
    write(to, offset, from, channels, stride);
  }
}

// Fetches rows of tokens that come next and writes rows of those before, a few with every `step` between two products: the
// rows of a head stand apart in memory, in strides that the processor does not foresee, and it can wait for a few lines only
// at the same time.
class Meanwhile {
  static constexpr int64_t LINE = 64;  // bytes
  struct Source {
    const char* next;
    int64_t stride, bytes, left;
  };
  struct Result {
    Tensor to;
    int64_t offset, channels, left, width;
    const float* from;
    INLINE void write(Stores stores) {
      if (left == 0) return;
      write_row(to, offset, from, channels, to.stride[3], stores);
      offset += to.stride[1], from += width, left--;
    }
  };
  Source sources[8];
  Result results[8];
  int source_count = 0, result_count = 0;
  Stores stores;

 public:
  explicit Meanwhile(Stores stores_) : stores(stores_) {}
  // `rows` rows of `channels` numbers, from the number `offset` of x on.
  void fetch(const Tensor& x, int64_t offset, int64_t rows, int64_t channels) {
    const int64_t size = x.type == Type::bfloat16 ? 2 : 4;
    const char* start = static_cast<const char*>(x.data) + offset * size;
    if (x && rows > 0) sources[source_count++] = {start, x.stride[1] * size, channels * size, rows};
  }
  // The same for rows that are written, from rows `width` apart.
  void write(const Tensor& x, int64_t offset, int64_t rows, int64_t channels, const float* from, int64_t width) {
    if (x) results[result_count++] = {x, offset, channels, rows, width, from};
  }
  INLINE void step() {
    for (int i = 0; i < source_count; i++) {
      Source& x = sources[i];
      if (x.left == 0) continue;
      for (int64_t at = 0; at < x.bytes; at += LINE) __builtin_prefetch(x.next + at, 0, 2);
      x.next += x.stride, x.left--;
    }
    for (int i = 0; i < result_count; i++) {
      results[i].write(stores);
      results[i].write(stores);
    }
  }
  // Writes what is left.
  void finish() {
    for (int i = 0; i < result_count; i++)
      while (results[i].left > 0) results[i].write(stores);
    result_count = 0;
  }
};

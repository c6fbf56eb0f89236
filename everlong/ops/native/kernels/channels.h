// Units of work of operators whose channels do not see each other: ranges of neighbouring channels of one sequence.
#pragma once
#include <algorithm>

#include "parallel.h"
#include "simd.h"

// run(n, first, count) for ranges of at most `widest` channels (a multiple of LANES) that cover those of all sequences.
// A thread walks through time with a whole range, so that it reads memory in long rows. Where a range begins depends on
// the number of threads; what is computed for a channel does not.
template <class Run>
void for_channels(int64_t sequences, int64_t channels, int64_t widest, Run run) {
  int64_t vectors = (channels + LANES - 1) / LANES;
  parallel_ranges(sequences * vectors, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t n = begin / vectors, first = begin % vectors;
      int64_t last = std::min({first + end - begin, first + widest / LANES, vectors});
      run(n, first * LANES, std::min(last * LANES, channels) - first * LANES);
      begin += last - first;
    }
  });
}

// visit(i, some) for the vectors of `count` numbers, the last one perhaps shorter.
template <class Visit>
INLINE void for_vectors(int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) visit(i, LANES);
  if (i < count) visit(i, count - i);
}

// Numbers of a result of which the caches hold little by the time somebody reads it: 8 MB of float32.
constexpr int64_t LARGE = 1 << 21;

// A row of a result, which goes past the caches where the whole result is large.
template <class Number>
struct Row {
  Number* data;
  bool past;
  Row(Number* data, bool large) : data(data), past(large && reinterpret_cast<uintptr_t>(data) % sizeof(Vec) == 0) {}
  INLINE void put(int64_t i, Vec x, int64_t some) const {
    past&& some == LANES ? stream(data + i, x) : store_some(data + i, x, some);
  }
};

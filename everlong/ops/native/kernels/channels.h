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

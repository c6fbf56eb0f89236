// What the library as a whole offers: threads, and what it was built for.
#include "parallel.h"
#include "simd.h"

ParallelFor parallel_for_of_torch = nullptr;

extern "C" {
__attribute__((visibility("default"))) void use_threads_of_torch(ParallelFor parallel_for) {
  parallel_for_of_torch = parallel_for;
}
__attribute__((visibility("default"))) int64_t lanes_of_a_vector() { return LANES; }
}

// Units of work on all threads, and the memory that each works in.
//
// Every unit is computed by one thread from start to end, in the same order of arithmetic whatever the number of threads:
// so results do not depend on it, bit for bit. Nothing is summed across threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

using Range = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range range, void* context);

// torch's thread pool, given when the library is loaded; without it OpenMP's, or the calling thread alone.
extern ParallelFor parallel_for_of_torch;

// Numbers too small to be normal count as 0: under a strong decay they would make every product ten times slower.
class FlushDenormals {
#if defined(__SSE__)
  unsigned before = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(before | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before = read();
  static uint64_t read() {
    uint64_t fpcr;
    asm volatile("mrs %0, fpcr" : "=r"(fpcr));
    return fpcr;
  }
  static void write(uint64_t fpcr) { asm volatile("msr fpcr, %0" ::"r"(fpcr)); }

 public:
  FlushDenormals() { write(before | (1u << 24)); }
  ~FlushDenormals() { write(before); }
#else
 public:
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
};

struct KeptMemory {
  char* start = nullptr;
  int64_t size = 0;
  ~KeptMemory() { std::free(start); }
};

// A thread's memory for intermediate results: taken piece by piece, given back all at once, kept for the next call.
// What it gives is not cleared.
class Scratch {
  static constexpr int64_t LINE = 64;  // bytes
  static inline thread_local KeptMemory memory;
  int64_t used = 0;

 public:
  // Room for `bytes` in all, each piece rounded up to a cache line.
  explicit Scratch(int64_t bytes) {
    if (bytes <= memory.size) return;
    std::free(memory.start);
    memory.size = (bytes + LINE - 1) / LINE * LINE;
    memory.start = static_cast<char*>(std::aligned_alloc(LINE, memory.size));
    if (!memory.start) {
      memory.size = 0;
      throw std::bad_alloc();
    }
  }
  template <class Number = float>
  Number* take(int64_t count) {
    Number* piece = reinterpret_cast<Number*>(memory.start + used);
    used += (count * int64_t(sizeof(Number)) + LINE - 1) / LINE * LINE;
    if (used > memory.size) std::abort();
    return piece;
  }
};

// work(begin, end) for ranges that cover 0 .. count: each thread gets one, of consecutive units.
template <class Work>
void parallel_ranges(int64_t count, Work work) {
  auto range = [](int64_t begin, int64_t end, void* context) {
    FlushDenormals flush;
    (*static_cast<Work*>(context))(begin, end);
  };
  if (count <= 1) {
    if (count == 1) range(0, 1, &work);
    return;
  }
  if (parallel_for_of_torch) {
    if (parallel_for_of_torch(0, count, 1, range, &work)) throw std::bad_alloc();
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel
  {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
    if (begin < end) range(begin, end, &work);
  }
#else
  range(0, count, &work);
#endif
}

// run(next) on each thread, where next() gives the number of a unit that nobody has taken yet, the lowest first, and
// `count` or more when there is none left: for units of unequal size, and for those that wait for lower ones.
template <class Run>
void parallel_queue(int64_t count, Run run) {
  std::atomic<int64_t> taken{0};
  parallel_ranges(count, [&](int64_t, int64_t) { run([&] { return taken.fetch_add(1, std::memory_order_relaxed); }); });
}

// What the kernels over trees of tokens share: a node's parent comes before it, and -1 stands for what is before the tree.
#pragma once
#include "arguments.h"
#include "parallel.h"

// The paths of all nodes, each from the node to the root, one after another: their steps are numbered through.
struct Paths {
  const int64_t* parents;
  int64_t count;  // nodes
  int64_t* first;  // [count + 1]: the number of a path's first step

  static int64_t bytes(int64_t count) { return 8 * (count + 1) + 64; }
  Paths(const Tensor& tree, int64_t count, Scratch& scratch)
      : parents(tree.at<int64_t>()), count(count), first(scratch.take<int64_t>(count + 1)) {
    first[0] = 0;
    for (int64_t node = 0; node < count; node++)
      first[node + 1] = first[node] + 1 + (parents[node] < 0 ? 0 : steps(parents[node]));
  }
  INLINE int64_t steps(int64_t node) const { return first[node + 1] - first[node]; }
  // visit(step, ancestor) from `from` (the node itself or its parent) to the root; `step` is the number of the first visit.
  template <class Visit>
  INLINE void walk(int64_t from, int64_t step, Visit visit) const {
    for (int64_t node = from; node >= 0; node = parents[node]) visit(step++, node);
  }
};

// How many steps the paths of a tree have.
INLINE int64_t steps_of(const Tensor& tree, int64_t count) {
  Scratch scratch(Paths::bytes(count));
  return Paths(tree, count, scratch).first[count];
}

// work(begin, end) for ranges that cover `units`; on the calling thread alone where `operations` are so few, some 20
// microseconds, that waiting for others takes longer wherever these have something else to do.
template <class Work>
void parallel_if_much(int64_t units, int64_t operations, Work work) {
  const int64_t few = 1 << 20;
  int64_t shares = operations < few ? 1 : units;
  parallel_ranges(units ? shares : 0, [&](int64_t begin, int64_t end) {
    work(begin * units / shares, end * units / shares);
  });
}

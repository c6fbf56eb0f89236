// The delta rule and diagonal plus low rank over whole sequences.
//
// States are kept every `group` tokens; the backward pass makes the blocks of a group again from there. Where there are
// fewer heads than threads, the columns of values and states are shared out, since they do not mix: forwards entirely,
// backwards to carry the gradient of the state to every group, after which the groups are independent of each other.
#pragma once
#include "decayed.h"
#include "low_rank_step.h"

namespace low_rank {

// Tokens begin .. end of a head of sequence n.
struct Group {
  Sequence sequence;
  int64_t n, head, begin, end;

  // Its block of `size` tokens from t on; there may be none.
  Place block(int64_t t, int64_t size) const { return {sequence.row, t, std::clamp<int64_t>(end - t, 0, size), head}; }
  bool first() const { return begin == sequence.start; }
  bool last() const { return end == sequence.stop; }
  int64_t state(const LowRankInputs& in) const { return in.group_at(sequence, n, begin); }
};

template <class RULE, class DECAY>
struct GroupForward {
  static constexpr int SIZE = DECAY::SIZE;
  Block<RULE, DECAY> block;
  float* o;

  template <class Memory>
  void place(Memory& memory, const LowRankInputs& in) {
    block.place(memory, in.padded_keys(), in.padded_values());
    o = memory.take(SIZE * block.values);
  }

  // From the state that stands in `last`, and to there.
  void run(const LowRankForward& x, const Group& group, const Group& next) {
    const Stores stores = x.in.stores();
    read_state(block.state, group.first() ? x.state : x.last, group.n, group.head, x.in);
    if (x.starts) write_state(x.starts, group.state(x.in), group.head, block.state, x.in, stores);
    for (int64_t t = group.begin; t < group.end; t += SIZE) {
      const Place at = group.block(t, SIZE);
      Meanwhile meanwhile(stores);
      fetch_block<RULE>(meanwhile, x.in, t + SIZE < group.end ? group.block(t + SIZE, SIZE) : next.block(next.begin, SIZE));
      read_block(block, x.in, at);
      DECAY::multiply(block);
      solve(block, meanwhile);
      output(block, o, meanwhile);
      meanwhile.write(x.o, offset(x.o, at, at.head), at.count, x.in.values, o, block.values);
      advance(block, block.state, meanwhile);
      meanwhile.finish();
    }
    write_state(x.last, group.n, group.head, block.state, x.in);
  }
};

// The gradient of the state alone; that of beta, which comes along, is of no use here.
template <class RULE, class DECAY>
struct CarryBack {
  static constexpr int SIZE = DECAY::SIZE;
  Block<RULE, DECAY> block;
  Workspace<RULE, DECAY> work;

  template <class Memory>
  void place(Memory& memory, const LowRankInputs& in) {
    block.place(memory, in.padded_keys(), in.padded_values());
    work.place(memory, in.padded_keys(), in.padded_values());
  }

  // From the gradient that stands in `d_state`, and to there.
  void run(const LowRankBackward& x, const Group& group, const Group&) {
    read_state(work.d_state, group.last() ? x.d_last : x.d_state, group.n, group.head, x.in);
    write_state(x.ends, group.state(x.in), group.head, work.d_state, x.in);
    for (int64_t i = (group.end - group.begin + SIZE - 1) / SIZE - 1; i >= 0; i--) {
      const Place at = group.block(group.begin + i * SIZE, SIZE);
      Meanwhile nothing(Stores::cached);
      read_block(block, x.in, at);
      DECAY::multiply(block);
      read_rows(work.d_o, SIZE, block.values, x.d_o, at, at.head, x.in.values);
      solve_backward(block, work);
      advance_backward(block, work, nothing);
    }
    write_state(x.d_state, group.n, group.head, work.d_state, x.in);
  }
};

template <class RULE, class DECAY>
struct GroupBackward {
  static constexpr int SIZE = DECAY::SIZE;
  Block<RULE, DECAY>* blocks;
  Workspace<RULE, DECAY> work;

  template <class Memory>
  void place(Memory& memory, const LowRankInputs& in) {
    const int64_t count = in.group / SIZE;
    blocks = memory.template take<Block<RULE, DECAY>>(count);
    Block<RULE, DECAY> other;
    for (int64_t i = 0; i < count; i++) (blocks ? blocks[i] : other).place(memory, in.padded_keys(), in.padded_values());
    work.place(memory, in.padded_keys(), in.padded_values());
  }

  // From the gradient of the state that stands in `ends`, or else in `d_state`, and then to there.
  void run(const LowRankBackward& x, const Group& group, const Group& next) {
    const LowRankInputs& in = x.in;
    const int64_t count = (group.end - group.begin + SIZE - 1) / SIZE;
    auto place = [&](int64_t i) { return group.block(group.begin + i * SIZE, SIZE); };
    auto fetch_d_o = [&](Meanwhile& meanwhile, int64_t i) {
      if (i >= 0) meanwhile.fetch(x.d_o, offset(x.d_o, place(i), group.head), place(i).count, in.values);
    };
    make_blocks(x, group, count, place, fetch_d_o);
    if (x.ends) {
      read_state(work.d_state, x.ends, group.state(in), group.head, in);
    } else {
      read_state(work.d_state, group.last() ? x.d_last : x.d_state, group.n, group.head, in);
    }
    for (int64_t i = count - 1; i >= 0; i--) {
      const Block<RULE, DECAY>& block = blocks[i];
      Meanwhile meanwhile(in.stores());
      fetch_d_o(meanwhile, i - 1);
      if (i == 0) fetch_block<RULE>(meanwhile, in, next.block(next.begin, SIZE));
      read_rows(work.d_o, SIZE, block.values, x.d_o, place(i), group.head, in.values);
      solve_backward(block, work);
      if constexpr (RULE::SOURCES == 2) second_source_backward(block, work);
      products_backward(block, work, meanwhile);
      DECAY::multiply_backward(block, work.gradient);
      write_gradients(meanwhile, x, place(i), work);
      advance_backward(block, work, meanwhile);
      meanwhile.finish();
    }
    if (!x.ends) write_state(x.d_state, group.n, group.head, work.d_state, in);
  }

  // The blocks once more as they were forwards, from the state that was kept.
  template <class At, class Fetch>
  void make_blocks(const LowRankBackward& x, const Group& group, int64_t count, At place, Fetch fetch_d_o) {
    read_state(blocks[0].state, x.starts, group.state(x.in), group.head, x.in);
    for (int64_t i = 0; i < count; i++) {
      Meanwhile meanwhile(Stores::cached);
      if (i + 1 < count) {
        fetch_block<RULE>(meanwhile, x.in, place(i + 1));
      } else {
        fetch_d_o(meanwhile, i);
      }
      read_block(blocks[i], x.in, place(i));
      DECAY::multiply(blocks[i]);
      solve(blocks[i], meanwhile);
      if (i + 1 < count) advance(blocks[i], blocks[i + 1].state, meanwhile);
    }
  }
};

template <class GROUP>
GROUP placed(const LowRankInputs& in) {
  GROUP group;
  Counter counter;
  group.place(counter, in);
  Scratch scratch(counter.bytes);
  group.place(scratch, in);
  return group;
}

// visit(x, sequence, its number, first head, last head + 1) for all heads of all sequences, on all threads; where that is
// fewer than threads, for some columns after others: x is then the part of the arguments with these.
template <class Arguments, class Visit>
void for_heads(const Arguments& x, Visit visit) {
  const LowRankInputs& in = x.in;
  const int64_t units = in.sequences * in.heads, lines = std::max<int64_t>(round_up(in.values, LINE) / LINE, 1);
  const int64_t wanted = units ? (in.threads + units - 1) / units : 1;
  const int64_t width = (lines + wanted - 1) / wanted * LINE, parts = round_up(lines * LINE, width) / width;
  parallel_ranges(units * parts, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t part = begin / in.heads, stop = std::min(end, (part + 1) * in.heads), n = part / parts;
      const Sequence s = sequence_of(in.cu_seqlens, n, in.length);
      visit(columns(x, part % parts * width, width), s, n, begin - part * in.heads, stop - part * in.heads);
      begin = stop;
    }
    end_streams();
  });
}

// run(group, the one after it) for groups in the order of time, or against it, and in it head after head: the heads of a
// token share pages of memory. An empty sequence has one group without tokens, which hands its state on.
enum class Order { forwards, backwards };
template <class Run>
INLINE void for_groups(Order order, int64_t size, const Sequence& s, int64_t n, int64_t first, int64_t stop, Run run) {
  const int64_t count = std::max<int64_t>((s.stop - s.start + size - 1) / size, 1), heads = stop - first;
  auto group = [&](int64_t i) {
    if (i == count * heads) return Group{s, n, first, s.stop, s.stop};
    int64_t begin = s.start + (order == Order::forwards ? i / heads : count - 1 - i / heads) * size;
    return Group{s, n, first + i % heads, begin, std::min(begin + size, s.stop)};
  };
  for (int64_t i = 0; i < count * heads; i++) run(group(i), group(i + 1));
}

template <class RULE, class DECAY>
void low_rank_forward(const LowRankForward& all) {
  for_heads(all, [](const LowRankForward& x, const Sequence& s, int64_t n, int64_t first, int64_t stop) {
    if (s.stop - s.start <= STEPS) {
      auto few = placed<FewTokens<RULE>>(x.in);
      for (int64_t head = first; head < stop; head++) few.run(x, s, n, head);
      return;
    }
    auto work = placed<GroupForward<RULE, DECAY>>(x.in);
    for_groups(Order::forwards, x.in.group, s, n, first, stop,
               [&](const Group& group, const Group& next) { work.run(x, group, next); });
  });
}

template <class WORK>
void backward_by_heads(const LowRankBackward& all) {
  for_heads(all, [](const LowRankBackward& x, const Sequence& s, int64_t n, int64_t first, int64_t stop) {
    auto work = placed<WORK>(x.in);
    for_groups(Order::backwards, x.in.group, s, n, first, stop,
               [&](const Group& group, const Group& next) { work.run(x, group, next); });
  });
}

template <class RULE, class DECAY>
void backward_by_groups(const LowRankBackward& x) {
  const LowRankInputs& in = x.in;
  for (int64_t n = 0; n < in.sequences; n++) {
    const Sequence s = sequence_of(in.cu_seqlens, n, in.length);
    const int64_t groups = (s.stop - s.start + in.group - 1) / in.group;
    parallel_ranges(groups, [&](int64_t begin, int64_t end) {
      auto work = placed<GroupBackward<RULE, DECAY>>(in);
      for (int64_t i = begin; i < end; i++)
        for (int64_t head = 0; head < in.heads; head++) {
          int64_t t = s.start + i * in.group;
          work.run(x, {s, n, head, t, std::min(t + in.group, s.stop)}, {s, n, head, s.stop, s.stop});
        }
      end_streams();
    });
  }
}

template <class RULE, class DECAY>
void low_rank_backward(const LowRankBackward& x) {
  if (x.ends) {
    backward_by_heads<CarryBack<RULE, DECAY>>(x);
    backward_by_groups<RULE, DECAY>(x);
  } else {
    backward_by_heads<GroupBackward<RULE, DECAY>>(x);
  }
}

}  // namespace low_rank

// The delta rule and diagonal plus low rank over whole sequences.
//
// States are kept every `group` tokens; the backward pass makes the blocks of a group again from there. Where there are
// fewer heads than threads, the columns of values and states are shared out, since they do not mix: forwards entirely,
// backwards to carry the gradient of the state to every group, after which the groups are independent of each other.
#pragma once
#include "decayed.h"
#include "low_rank_step.h"

template <class RULE, class DECAY>
struct GroupForward {
  Block<RULE, DECAY> block;
  float* o;

  template <class Memory>
  void place(Memory& memory, const LowRankInputs& in) {
    block.place(memory, in.padded_keys(), in.padded_values());
    o = memory.take(DECAY::SIZE * block.values);
  }

  // Tokens begin .. end of a head, from the state that stands in `last`, and to there.
  void run(const LowRankForward& x, const Sequence& s, int64_t n, int64_t head, int64_t begin, int64_t end) {
    read_state(block.state, begin == s.start ? x.state : x.last, n, head, x.in);
    if (x.starts) write_state(x.starts, x.in.group_at(s, n, begin), head, block.state, x.in);
    for (int64_t t = begin; t < end; t += DECAY::SIZE) {
      Place at{s.row, t, std::min<int64_t>(DECAY::SIZE, end - t), head};
      read_block(block, x.in, at);
      DECAY::multiply(block);
      solve(block);
      output(block, o);
      advance(block, block.state);
      write_rows(x.o, at, o, block.values, x.in.values);
    }
    write_state(x.last, n, head, block.state, x.in);
  }
};

// The gradient of the state alone, from the end of a group to its beginning; that of beta, which comes along, is no use here.
template <class RULE, class DECAY>
struct CarryBack {
  Block<RULE, DECAY> block;
  Workspace<RULE, DECAY> work;

  template <class Memory>
  void place(Memory& memory, const LowRankInputs& in) {
    block.place(memory, in.padded_keys(), in.padded_values());
    work.place(memory, in.padded_keys(), in.padded_values());
  }

  void run(const LowRankBackward& x, const Sequence& s, int64_t n, int64_t head, int64_t begin, int64_t end) {
    constexpr int SIZE = DECAY::SIZE;
    read_state(work.d_state, end == s.stop ? x.d_last : x.d_state, n, head, x.in);
    write_state(x.ends, x.in.group_at(s, n, begin), head, work.d_state, x.in);
    for (int64_t t = begin + (end - begin - 1) / SIZE * SIZE; t >= begin && t < end; t -= SIZE) {
      Place at{s.row, t, std::min<int64_t>(SIZE, end - t), head};
      read_block(block, x.in, at);
      DECAY::multiply(block);
      read_rows(work.d_o, SIZE, block.values, x.d_o, at, head, x.in.values);
      solve_backward(block, work);
      advance_backward(block, work);
    }
    write_state(x.d_state, n, head, work.d_state, x.in);
  }
};

template <class RULE, class DECAY>
struct GroupBackward {
  Block<RULE, DECAY>* blocks;
  Workspace<RULE, DECAY> work;

  template <class Memory>
  void place(Memory& memory, const LowRankInputs& in) {
    const int64_t count = in.group / DECAY::SIZE;
    blocks = memory.template take<Block<RULE, DECAY>>(count);
    Block<RULE, DECAY> other;
    for (int64_t i = 0; i < count; i++) (blocks ? blocks[i] : other).place(memory, in.padded_keys(), in.padded_values());
    work.place(memory, in.padded_keys(), in.padded_values());
  }

  // Tokens begin .. end of a head, from the gradient of the state that stands in `ends`, or else in `d_state`, and to there.
  void run(const LowRankBackward& x, const Sequence& s, int64_t n, int64_t head, int64_t begin, int64_t end) {
    constexpr int SIZE = DECAY::SIZE;
    const LowRankInputs& in = x.in;
    const int64_t count = (end - begin + SIZE - 1) / SIZE, group = in.group_at(s, n, begin);
    auto place = [&](int64_t i) {
      int64_t t = begin + i * SIZE;
      return Place{s.row, t, std::min<int64_t>(SIZE, end - t), head};
    };
    read_state(blocks[0].state, x.starts, group, head, in);
    for (int64_t i = 0; i < count; i++) {
      read_block(blocks[i], in, place(i));
      DECAY::multiply(blocks[i]);
      solve(blocks[i]);
      if (i + 1 < count) advance(blocks[i], blocks[i + 1].state);
    }
    if (x.ends) {
      read_state(work.d_state, x.ends, group, head, in);
    } else {
      read_state(work.d_state, end == s.stop ? x.d_last : x.d_state, n, head, in);
    }
    for (int64_t i = count - 1; i >= 0; i--) {
      const Block<RULE, DECAY>& block = blocks[i];
      read_rows(work.d_o, SIZE, block.values, x.d_o, place(i), head, in.values);
      solve_backward(block, work);
      if constexpr (RULE::SOURCES == 2) second_source_backward(block, work);
      products_backward(block, work);
      DECAY::multiply_backward(block, work.gradient);
      write_gradients(x, place(i), block, work);
      advance_backward(block, work);
    }
    if (!x.ends) write_state(x.d_state, n, head, work.d_state, in);
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
  });
}

template <class RULE, class DECAY>
void low_rank_forward(const LowRankForward& all) {
  for_heads(all, [](const LowRankForward& x, const Sequence& s, int64_t n, int64_t first, int64_t stop) {
    if (s.stop - s.start <= STEPS) {
      auto few = placed<FewTokens<RULE>>(x.in);
      for (int64_t head = first; head < stop; head++) few.run(x, s, n, head);
      return;
    }
    // Group after group, and in it head after head: the heads of a token share pages of memory.
    auto group = placed<GroupForward<RULE, DECAY>>(x.in);
    for (int64_t t = s.start; t < s.stop; t += x.in.group)
      for (int64_t head = first; head < stop; head++) group.run(x, s, n, head, t, std::min(t + x.in.group, s.stop));
  });
}

// An empty sequence has one group without tokens, which hands the gradient of its state on.
INLINE int64_t last_group(const LowRankInputs& in, const Sequence& s) {
  return s.start + std::max<int64_t>(s.stop - s.start - 1, 0) / in.group * in.group;
}

template <class GROUP>
void backward_by_heads(const LowRankBackward& all) {
  for_heads(all, [](const LowRankBackward& x, const Sequence& s, int64_t n, int64_t first, int64_t stop) {
    auto group = placed<GROUP>(x.in);
    for (int64_t t = last_group(x.in, s); t >= s.start; t -= x.in.group)
      for (int64_t head = first; head < stop; head++) group.run(x, s, n, head, t, std::min(t + x.in.group, s.stop));
  });
}

template <class RULE, class DECAY>
void backward_by_groups(const LowRankBackward& x) {
  const LowRankInputs& in = x.in;
  for (int64_t n = 0; n < in.sequences; n++) {
    const Sequence s = sequence_of(in.cu_seqlens, n, in.length);
    const int64_t groups = (s.stop - s.start + in.group - 1) / in.group;
    parallel_ranges(groups * in.heads, [&](int64_t begin, int64_t end) {
      auto group = placed<GroupBackward<RULE, DECAY>>(in);
      for (int64_t unit = begin; unit < end; unit++) {
        int64_t t = s.start + unit / in.heads * in.group;
        group.run(x, s, n, unit % in.heads, t, std::min(t + in.group, s.stop));
      }
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

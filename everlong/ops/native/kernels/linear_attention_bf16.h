// What the passes of linear attention in bfloat16 share: how a sequence is cut, where its tokens stand, how they fade.
//
//     S_t = a_t S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t        a_t = e^{g_t}, of a head
//
// In a chunk of tokens i, j = 0 .. C-1 that starts with the state S:
//
//     between_ij = a_{j+1} ... a_i  for j <= i        reach_i = a_0 ... a_i
//     store_j = a_{j+1} ... a_{C-1}                   total = a_0 ... a_{C-1}
//
// All are running products: exact where a gate is closed (a = 0), and never the difference of two large sums.
#pragma once
#include "arguments.h"
#include "parallel.h"
#include "tiles.h"

#include <algorithm>

namespace linear_attention_bf16 {

constexpr int64_t BLOCK = 32;         // rows and columns of a block of products
constexpr int64_t CHUNK = 64;         // tokens
constexpr int64_t GROUP = 4 * CHUNK;  // tokens from one saved state to the next
constexpr int64_t HEADS = 8;          // that take turns by chunks: tokens have their heads side by side in memory

// Channels of a head as they are, and filled up to whole blocks.
struct Channels {
  int64_t count, wide;
  explicit Channels(int64_t count) : count(count), wide(round_up(count, BLOCK)) {}
};

// The tokens of one chunk.
struct Span {
  int64_t row, first, count;
  int64_t rows() const { return round_up(count, BLOCK); }
};

// Of sequence n, `count` states: that before its first token and before each GROUP tokens more.
struct Groups {
  int64_t first, count;
};
INLINE Groups groups_of(const Tensor& cu_seqlens, int64_t n, int64_t length, Sequence s) {
  int64_t count = (s.stop - s.start + GROUP - 1) / GROUP;
  return {cu_seqlens ? s.start / GROUP + n : n * ((length + GROUP - 1) / GROUP), count};
}

struct Rows {
  const bfloat16* data;
  int64_t row;
};
// The tokens' numbers in place; where tokens or channels are missing in the last block, a copy filled up with zeros.
INLINE Rows rows_of(const Tensor& x, Span at, int64_t head, Channels channels, bfloat16* copy) {
  const bfloat16* from = x.at<bfloat16>(at.row, at.first, head);
  if (at.count % BLOCK == 0 && channels.count == channels.wide) return {from, x.stride[1]};
  for (int64_t t = 0; t < at.rows(); t++) {
    int64_t there = t < at.count ? channels.count : 0;
    std::memcpy(copy + t * channels.wide, from + t * x.stride[1], there * sizeof *copy);
    std::memset(copy + t * channels.wide + there, 0, (channels.wide - there) * sizeof *copy);
  }
  return {copy, channels.wide};
}

// Asks for the tokens of the next chunk while this one is computed, a few at a time: the processor itself sees no
// pattern in rows that lie far apart, and a burst would fill its queue.
class Ahead {
  Rows rows[4];
  int64_t bytes[4];
  int tensors = 0;
  int64_t next = 0, count, step;

 public:
  // For `count` tokens, some of them at each of `calls` calls.
  Ahead(int64_t count, int64_t calls) : count(count), step((count + calls - 1) / calls) {}
  INLINE void add(const Tensor& x, Span at, int64_t head, Channels channels) {
    rows[tensors] = {x.at<bfloat16>(at.row, at.first, head), x.stride[1]};
    bytes[tensors++] = channels.count * int64_t(sizeof(bfloat16));
  }
  INLINE void fetch() {
    for (int64_t stop = std::min(next + step, count); next < stop; next++)
      for (int i = 0; i < tensors; i++)
        for (int64_t byte = 0; byte < bytes[i]; byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(rows[i].data + next * rows[i].row) + byte, 0, 2);
  }
};

// Writes block [BLOCK][BLOCK] * scale to the tokens from `t` and the channels from `c` on, those that there are.
INLINE void write_block(const Tensor& x, Span at, int64_t head, Channels channels, int64_t t, int64_t c,
                        const float* block, float scale) {
  bfloat16* to = x.at<bfloat16>(at.row, at.first + t, head, c);
  int64_t tokens = std::min(BLOCK, at.count - t), there = std::min(BLOCK, channels.count - c);
  for (int64_t i = 0; i < tokens; i++, to += x.stride[1], block += BLOCK) {
    if (there == BLOCK) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < BLOCK; j += 2 * LANES)
        store_pairs(to + j, consecutive(load(block + j) * scale, load(block + j + LANES) * scale));
    } else {
      for (int64_t j = 0; j < there; j += LANES) store_some(to + j, load(block + j) * scale, there - j);
    }
  }
}

// The state of a head in blocks, rows and columns that do not exist being zeros; and back.
INLINE void read_state(float* to, const Tensor& from, int64_t n, int64_t head, Channels keys, Channels values) {
  std::memset(to, 0, keys.wide * values.wide * sizeof *to);
  if (!from) return;
  for (int64_t d = 0; d < keys.count; d++)
    std::memcpy(to + d * values.wide, from.at<float>(n, head, d), values.count * sizeof *to);
}
INLINE void write_state(const Tensor& to, int64_t n, int64_t head, const float* from, Channels keys, Channels values) {
  for (int64_t d = 0; d < keys.count; d++)
    std::memcpy(to.at<float>(n, head, d), from + d * values.wide, values.count * sizeof *from);
}

// a of a chunk's tokens; 1 where there is none.
INLINE void read_gates(float* gates, const Tensor& log_decay, Span at, int64_t head) {
  const int64_t* stride = log_decay.stride;
  for (int64_t t = 0; t < at.rows(); t++) gates[t] = 0.0f;
  read(gates, log_decay, at.row * stride[0] + at.first * stride[1] + head * stride[2], at.count, stride[1]);
  for (int64_t t = 0; t < at.rows(); t += LANES) store(gates + t, exp(load(gates + t)));
}

// Counts what a Scratch has to hold.
struct Measure {
  int64_t bytes = 0;
  template <class Number = float>
  Number* take(int64_t count) {
    bytes += round_up(count * int64_t(sizeof(Number)), 64);
    return nullptr;
  }
};

// A pass's memory, which takes its pieces from a Measure or a Scratch.
template <class Memory>
struct Work {
  Channels keys, values;
  Measure measure;
  Memory measured;
  Scratch scratch;
  Memory memory;
  Work(int64_t keys, int64_t values)
      : keys(keys),
        values(values),
        measured(measure, this->keys.wide, this->values.wide),
        scratch(measure.bytes),
        memory(scratch, this->keys.wide, this->values.wide) {}
  int64_t size() const { return keys.wide * values.wide; }  // of a state
};

// work(sequence, first head, count of heads) for all sequences and heads, HEADS or fewer at a time.
template <class Work>
void for_heads(int64_t sequences, int64_t heads, Work work) {
  parallel_ranges(sequences * heads, [&](int64_t begin, int64_t end) {
    TileRegisters tiles;
    for (int64_t unit = begin; unit < end;) {
      int64_t n = unit / heads, head = unit % heads;
      int64_t count = std::min({HEADS, heads - head, end - unit});
      work(n, head, count);
      unit += count;
    }
  });
}

// work(sequence, its tokens, first token of the group, place of its saved state, head) for all groups.
template <class Work>
void for_groups(const Tensor& cu_seqlens, int64_t sequences, int64_t length, int64_t slots, int64_t heads, Work work) {
  parallel_ranges(slots * heads, [&](int64_t begin, int64_t end) {
    TileRegisters tiles;
    for (int64_t n = 0; n < sequences; n++) {
      Sequence s = sequence_of(cu_seqlens, n, length);
      Groups groups = groups_of(cu_seqlens, n, length, s);
      for (int64_t g = 0; g < groups.count; g++)
        for (int64_t head = 0; head < heads; head++) {
          int64_t slot = groups.first + g, unit = slot * heads + head;
          if (begin <= unit && unit < end) work(n, s, s.start + g * GROUP, slot, head);
        }
    }
  });
}

// work(sequence, head, first value of a block) for all blocks of values.
template <class Work>
void for_blocks_of_values(int64_t sequences, int64_t heads, Channels values, Work work) {
  int64_t blocks = values.wide / BLOCK;
  parallel_ranges(sequences * heads * blocks, [&](int64_t begin, int64_t end) {
    TileRegisters tiles;
    for (int64_t unit = begin; unit < end; unit++)
      work(unit / blocks / heads, unit / blocks % heads, unit % blocks * BLOCK);
  });
}

}  // namespace linear_attention_bf16

// What the kernels of softmax attention share: which keys a query sees, and the pieces in which they meet.
//
// Everything between the products of a piece is transposed: keys down, queries side by side in the lanes of vectors, so
// that maxima and sums over the keys of a query never cross lanes.
#pragma once
#include "arguments.h"
#include "parallel.h"
#include "products.h"

#include <algorithm>
#include <vector>

constexpr int64_t QUERIES = 64;  // of a block, side by side
constexpr int64_t KEYS = 64;     // of a block, at places that are multiples of it
constexpr float INFINITE = __builtin_inff();

struct Span {
  int64_t begin, end;
  INLINE int64_t size() const { return end - begin; }
  INLINE bool empty() const { return begin >= end; }
};
INLINE Span common(Span a, Span b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// Query i of a sequence sits at position offset + i, key j at position j; `start` is where both begin in their row.
struct Meeting {
  int64_t row, start, queries, keys, offset;
};

// The arguments that all kernels begin with.
struct Attention {
  Tensor q, k, v;                        // [B, T, H, K], [B, S, G, K], [B, S, G, V]
  Tensor mask, key_lengths, cu_seqlens;  // boolean [B, H, T, S], int64 [B], [N + 1]; or none
  int64_t sequences, length, keys, heads, groups, key_channels, value_channels;
  int64_t left, right;  // a query at p sees keys from p - left to p + right
  double scale;

  int64_t shared() const { return heads / groups; }  // heads of queries for one of keys

  Meeting meeting(int64_t n) const {
    if (cu_seqlens) {
      Sequence s = sequence_of(cu_seqlens, n, length);
      return {s.row, s.start, s.stop - s.start, s.stop - s.start, 0};
    }
    if (!key_lengths) return {n, 0, length, keys, keys - length};
    int64_t real = std::clamp<int64_t>(*key_lengths.at<int64_t>(n), 0, keys);
    return {n, 0, length, real, std::min(keys - length, std::max<int64_t>(real - length, 0))};
  }
  // The keys that any of these queries sees by its position, and those that each of them sees.
  Span reach(const Meeting& m, Span queries) const {
    return common({m.offset + queries.begin - left, m.offset + queries.end + right}, {0, m.keys});
  }
  Span core(const Meeting& m, Span queries) const {
    return common({m.offset + queries.end - 1 - left, m.offset + queries.begin + right + 1}, {0, m.keys});
  }
};

// Some queries of one head: a unit of work. Units that add to the same gradients are numbered one after another.
struct Unit {
  int64_t n, head;
  Span queries;
  bool first;  // of those that share a head of keys
};

INLINE std::vector<Unit> units_of(const Attention& x, int64_t size) {
  std::vector<Unit> units;
  for (int64_t n = 0; n < x.sequences; n++) {
    int64_t queries = x.meeting(n).queries;
    for (int64_t group = 0; group < x.groups; group++)
      for (int64_t begin = 0; begin < queries; begin += size)
        for (int64_t i = 0; i < x.shared(); i++)
          units.push_back({n, group * x.shared() + i, {begin, std::min(begin + size, queries)}, begin == 0 && i == 0});
  }
  return units;
}

// Some keys and a block's queries that may see them: `lanes`, counted from the block's first query.
class Piece {
  const Attention& x;
  const Meeting& m;
  int64_t head, first_query;
  int32_t left, right;
  int32_t allowed[KEYS][QUERIES];  // by the mask

 public:
  Span keys, lanes;
  bool whole;  // each of these queries sees all of these keys

  Piece(const Attention& x, const Meeting& m, int64_t head, int64_t first_query)
      : x(x), m(m), head(head), first_query(first_query), left(int32_t(std::min<int64_t>(x.left, 1 << 30))),
        right(int32_t(std::min<int64_t>(x.right, 1 << 30))) {}

  // Which of LANES queries see the key `i` of the piece; keys beyond its last one are seen by none.
  INLINE Ints seen(int64_t i, int64_t lane) const {
    Ints distance = lane_numbers() + int32_t(m.offset + first_query + lane - keys.begin - i);
    Ints seen = (distance <= left) & (distance >= -right);
    if (keys.begin + i >= keys.end) return seen & 0;
    if (!x.mask) return seen;
    Ints by_mask;
    std::memcpy(&by_mask, &allowed[i][lane], sizeof by_mask);
    return seen & by_mask;
  }

  // Sets the piece; false where no query sees a key. `lanes` are multiples of `edge`.
  bool set(Span its_keys, Span queries, bool in_core, int64_t edge) {
    keys = its_keys;
    Span seeing = common(queries, {keys.begin - x.right - m.offset, keys.end + x.left - m.offset});
    if (keys.empty() || seeing.empty()) return false;
    lanes = {(seeing.begin - first_query) / edge * edge, round_up(seeing.end - first_query, edge)};
    whole = in_core;
    return x.mask ? read_mask(queries) : true;
  }

 private:
  bool read_mask(Span queries) {
    bool any = false, all = true;
    for (int64_t i = 0; i < keys.size(); i++)
      for (int64_t lane = lanes.begin; lane < lanes.end; lane++) {
        int64_t query = first_query + lane;
        bool there = query < queries.end && *x.mask.at<const bool>(m.row, head, m.start + query, m.start + keys.begin + i);
        allowed[i][lane] = there ? -1 : 0;
        any |= there;
        all &= there;
      }
    whole &= all;
    return any;
  }
};

// visit() with a piece set to each part of these keys that some of the queries see, in rising order: one where each query
// sees all, and pieces of `edge` keys (at multiples of it) around it.
template <class Visit>
INLINE void for_pieces(const Attention& x, const Meeting& m, Piece& piece, Span queries, Span keys, int64_t edge,
                       Visit visit) {
  Span seen = common(x.reach(m, queries), keys), core = common(x.core(m, queries), seen);
  core = {round_up(core.begin, edge), core.end / edge * edge};
  for (int64_t begin = seen.begin / edge * edge; begin < seen.end;) {
    bool inside = core.begin <= begin && begin < core.end;
    int64_t end = inside ? core.end : std::min(begin + edge, keys.end);
    if (piece.set({begin, end}, queries, inside, edge)) visit();
    begin = end;
  }
}

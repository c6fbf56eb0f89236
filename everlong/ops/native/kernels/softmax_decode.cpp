// Softmax attention of few queries over a long cache of keys and values, which is read once: as fast as memory gives it.
//
// The keys are split into parts of fixed size, whatever the threads. With x = scale q . k (base-2 logarithms), each part
// gives m = max x, l = sum 2^(x - m) and u = sum 2^(x - m) v; over the parts
//     m = max m_p     o = sum_p 2^(m_p - m) u_p / l     l = sum_p 2^(m_p - m) l_p     lse = m ln 2 + ln l
// A unit of work is a part of all heads: their keys lie side by side in a cache.
#include "attention_passes.h"

#include <memory>

namespace {

constexpr int64_t PART = 256;  // keys

// Rows of a unit: for each head its queries, so that those which share a head of keys follow one another.
struct Rows {
  const Attention& x;
  int64_t key_width, value_width, count, parts;

  explicit Rows(const Attention& x)
      : x(x), key_width(round_up(x.key_channels, LANES)), value_width(round_up(x.value_channels, LANES)),
        count(x.heads * x.length), parts(std::max<int64_t>((x.keys + PART - 1) / PART, 1)) {}
  int64_t of_group() const { return x.shared() * x.length; }
  // What a row leaves of a part: u, m, l.
  int64_t left() const { return value_width + 2 * LANES; }
  float* left(float* all, int64_t n, int64_t part, int64_t row) const {
    return all + ((n * parts + part) * count + row) * left();
  }
};

// LANES tokens of a head of the cache, in place or copied to `room`, where channels and tokens beyond the last are 0.
template <class Number>
struct CacheRows {
  const Number* data;
  int64_t row;
};
template <class Number>
CacheRows<Number> cache_rows(const Tensor& from, int64_t n, Span tokens, int64_t group, int64_t channels, int64_t width,
                             float* room) {
  const Number* data = from.at<const Number>(n, tokens.begin, group);
  if (tokens.size() == LANES && channels == width && from.stride[3] == 1) {
    // The tokens of the next visit: heads in turn are no order that the processor would foresee.
    for (int64_t j = LANES; j < 2 * LANES; j++)
      for (int64_t c = 0; c < width; c += 64 / int64_t(sizeof(Number))) __builtin_prefetch(data + j * from.stride[1] + c, 0, 2);
    return {data, from.stride[1]};
  }
  Number* copied = reinterpret_cast<Number*>(room);
  std::fill(copied, copied + LANES * width, Number{});
  for (int64_t j = 0; j < tokens.size(); j++)
    for (int64_t c = 0; c < channels; c++) copied[j * width + c] = data[j * from.stride[1] + c * from.stride[3]];
  return {copied, width};
}

// The sums of each vector's lanes, that of the j-th in lane j.
template <int S = LANES / 2>
INLINE Vec sums(Vec (&x)[LANES]) {
  if constexpr (S == 0) {
    return x[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < S; i++) x[i] = lanes::All::evens<S>(x[i], x[i + S]) + lanes::All::odds<S>(x[i], x[i + S]);
    return sums<S / 2>(x);
  }
}

// Which of LANES keys the query sees.
Ints seen(const Attention& x, const Meeting& m, int64_t head, int64_t query, Span keys) {
  Ints distance = int32_t(m.offset + query - keys.begin) - lane_numbers();
  const int32_t left = int32_t(std::min<int64_t>(x.left, 1 << 30)), right = int32_t(std::min<int64_t>(x.right, 1 << 30));
  Ints found = (distance <= left) & (distance >= -right) & (lane_numbers() < int32_t(keys.size()));
  if (!x.mask) return found;
  const bool* mask = x.mask.at<const bool>(m.row, head, query, keys.begin);
  if (x.mask.stride[3] == 1 && keys.size() == LANES) {
    int8_t __attribute__((vector_size(LANES))) bytes;
    std::memcpy(&bytes, mask, sizeof bytes);
    return found & (__builtin_convertvector(bytes, Ints) != 0);
  }
  for (int64_t j = 0; j < keys.size(); j++)
    if (!mask[j * x.mask.stride[3]]) found[j] = 0;
  return found;
}

// A unit's memory.
struct Room {
  float *q, *scores, *tokens;  // [rows, K] times scale / ln 2; [rows, PART]; [LANES, channels]

  static int64_t bytes(const Rows& rows) {
    return 4 * (rows.count * (rows.key_width + PART) + LANES * std::max(rows.key_width, rows.value_width)) + 3 * 64;
  }
  Room(const Rows& rows, Scratch& scratch)
      : q(scratch.take(rows.count * rows.key_width)), scores(scratch.take(rows.count * PART)),
        tokens(scratch.take(LANES * std::max(rows.key_width, rows.value_width))) {}
};

// x of these rows with LANES keys of a head, -infinity where a key is not seen.
template <class Number>
void score(const Rows& rows, const Meeting& m, int64_t group, Span keys, CacheRows<Number> cache, const Room& room,
           int64_t place) {
  const Attention& x = rows.x;
  for (int64_t row = group * rows.of_group(); row < (group + 1) * rows.of_group(); row++) {
    Vec products[LANES];
    for (Vec& product : products) product = zeros();
    for (int64_t c = 0; c < rows.key_width; c += LANES) {
      Vec q = load(room.q + row * rows.key_width + c);
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++) products[j] += q * load(cache.data + j * cache.row + c);
    }
    Ints visible = seen(x, m, row / x.length, row % x.length, keys);
    store(room.scores + row * PART + place, select(visible, sums(products), broadcast(-INFINITE)));
  }
}

// Scores become weights; m and l of the row.
void weigh(float* scores, int64_t count, float* top, float* total) {
  Vec largest_of = broadcast(-INFINITE), sum_of = zeros();
  for (int64_t j = 0; j < count; j += LANES) largest_of = max(largest_of, load(scores + j));
  *top = largest(largest_of);
  Vec base = broadcast(*top == -INFINITE ? 0.0f : *top);
  for (int64_t j = 0; j < count; j += LANES) {
    Vec weight = exp2(load(scores + j) - base);
    store(scores + j, weight);
    sum_of += weight;
  }
  *total = sum(sum_of);
}

// u += the weighted values of LANES keys; a weight of 0 takes nothing, not even of an infinite number.
template <int VECTORS, class Number>
INLINE void mix_channels(float* u, const float* weights, CacheRows<Number> cache) {
  Vec total[VECTORS];
#pragma GCC unroll 16
  for (int c = 0; c < VECTORS; c++) total[c] = load(u + c * LANES);
  for (int j = 0; j < LANES; j++) {
    if (weights[j] == 0.0f) continue;
#pragma GCC unroll 16
    for (int c = 0; c < VECTORS; c++) total[c] += weights[j] * load(cache.data + j * cache.row + c * LANES);
  }
#pragma GCC unroll 16
  for (int c = 0; c < VECTORS; c++) store(u + c * LANES, total[c]);
}
template <class Number>
void mix(float* u, int64_t width, const float* weights, CacheRows<Number> cache) {
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES) mix_channels<4, Number>(u + c, weights, {cache.data + c, cache.row});
  for (; c < width; c += LANES) mix_channels<1, Number>(u + c, weights, {cache.data + c, cache.row});
}

// What the keys of one part give to all rows of a sequence.
template <class Number>
void attend(const Rows& rows, int64_t n, int64_t part, float* left, Scratch scratch) {
  const Attention& x = rows.x;
  Meeting m = x.meeting(n);
  Room room(rows, scratch);
  Span reach = common(x.reach(m, {0, x.length}), {part * PART, (part + 1) * PART});
  int64_t begin = reach.begin / LANES * LANES;
  for (int64_t head = 0; head < x.heads; head++)
    read_rows(room.q + head * x.length * rows.key_width, rows.key_width, x.length, x.q, n, {0, x.length}, head,
              x.key_channels, float(x.scale * LOG2E));
  for (int64_t j = begin; j < reach.end; j += LANES)
    for (int64_t group = 0; group < x.groups; group++) {
      Span keys = {j, std::min(j + LANES, m.keys)};
      CacheRows cache = cache_rows<Number>(x.k, n, keys, group, x.key_channels, rows.key_width, room.tokens);
      score<Number>(rows, m, group, keys, cache, room, j - begin);
    }
  for (int64_t row = 0; row < rows.count; row++) {
    float* u = rows.left(left, n, part, row);
    std::fill(u, u + rows.value_width, 0.0f);
    weigh(room.scores + row * PART, reach.end - begin, u + rows.value_width, u + rows.value_width + LANES);
  }
  for (int64_t j = begin; j < reach.end; j += LANES)
    for (int64_t group = 0; group < x.groups; group++) {
      Span keys = {j, std::min(j + LANES, m.keys)};
      CacheRows cache = cache_rows<Number>(x.v, n, keys, group, x.value_channels, rows.value_width, room.tokens);
      for (int64_t row = group * rows.of_group(); row < (group + 1) * rows.of_group(); row++)
        mix<Number>(rows.left(left, n, part, row), rows.value_width, room.scores + row * PART + j - begin, cache);
    }
}

// The parts' sums, merged into those of part 0, and written.
void merge(const Forward& f, const Rows& rows, int64_t n, int64_t row, float* left) {
  const Attention& x = f.attention;
  int64_t width = rows.value_width, head = row / x.length, query = row % x.length;
  float top = -INFINITE, total = 0.0f;
  for (int64_t part = 0; part < rows.parts; part++) top = std::max(top, rows.left(left, n, part, row)[width]);
  float* all = rows.left(left, n, 0, row);
  for (int64_t part = 0; part < rows.parts; part++) {
    const float* its = rows.left(left, n, part, row);
    float share = exp2(broadcast(its[width] - (top == -INFINITE ? 0.0f : top)))[0];
    total += share * its[width + LANES];
    for (int64_t c = 0; c < width; c += LANES)
      store(all + c, (part ? load(all + c) : zeros()) + share * load(its + c));
  }
  for (int64_t c = 0; c < width; c += LANES) store(all + c, total == 0.0f ? zeros() : load(all + c) / total);
  write_rows(f.o, n, {query, query + 1}, head, x.value_channels, all, width);
  *f.lse.at<float>(n, query, head) = total == 0.0f ? -INFINITE : top / LOG2E + log(broadcast(total))[0];
}

}  // namespace

void decode(const Forward& f) {
  const Attention& x = f.attention;
  Rows rows(x);
  std::unique_ptr<float[]> left(new float[x.sequences * rows.parts * rows.count * rows.left()]);
  parallel_ranges(x.sequences * rows.parts, [&](int64_t begin, int64_t end) {
    Scratch scratch(Room::bytes(rows));
    with_type(x.k, [&](auto number) {
      for (int64_t i = begin; i < end; i++)
        attend<decltype(number)>(rows, i / rows.parts, i % rows.parts, left.get(), scratch);
    });
  });
  parallel_ranges(x.sequences * rows.count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) merge(f, rows, i / rows.count, i % rows.count, left.get());
  });
}

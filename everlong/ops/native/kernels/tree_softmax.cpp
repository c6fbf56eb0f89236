// Softmax attention over a tree of tokens behind a long prefix of keys, which each node sees, and its ancestors and itself.
//
//   x = scale q . k / ln 2     m = max x     l = sum 2^(x - m)     o = sum 2^(x - m) v / l     lse = m ln 2 + ln l
//
// The keys that all nodes see are taken in parts of fixed size, whatever the threads, and in blocks within a part; there
// all is transposed: keys down, the rows (nodes of all heads that share the keys) side by side in the lanes. What only
// some nodes see, ancestors and the edge of a window, each row then takes for itself, and nothing else, so that whatever
// stands at other nodes stays there. A unit of work is a part of the keys for a block of rows, and later the sum of parts.
#include <algorithm>
#include <memory>

#include "products.h"
#include "trees.h"

namespace {

struct Arguments {
  Tensor q, k, v, parents, key_lengths;  // [B, T, H, K], [B, S, G, K], [B, S, G, V], [T], int64 [B] or none
  Tensor o, lse;                         // [B, T, H, V], float32 [B, T, H]
  int64_t sequences, length, keys, heads, groups, channels, width;
  int64_t window;  // a node sees keys at distances below it
  double scale;
};

constexpr int64_t ROWS = 64;    // side by side
constexpr int64_t KEYS = 64;    // of a block
constexpr int64_t PART = 1024;  // keys
constexpr float LOWEST = -3e38f;  // a maximum over nothing: -infinity less this is -infinity, and not NaN

// Some rows of a group of heads, and the first key that all nodes see.
struct Block {
  int64_t n, group, first, count, prefix, begin;
};

class Plan {
  const Arguments& x;
  std::unique_ptr<int64_t[]> depths;  // [T]: how many ancestors
  int64_t deepest = 0;

 public:
  const int64_t rows, blocks, parts;  // of a group, of its rows, of the keys
  const int64_t key_width, value_width;

  explicit Plan(const Arguments& x)
      : x(x), depths(new int64_t[x.length]), rows(x.heads / x.groups * x.length), blocks((rows + ROWS - 1) / ROWS),
        parts(std::max<int64_t>((x.keys - x.length + PART - 1) / PART, 1)), key_width(round_up(x.channels, LANES)),
        value_width(round_up(x.width, LANES)) {
    const int64_t* parents = x.parents.at<int64_t>();
    for (int64_t node = 0; node < x.length; node++) {
      depths[node] = parents[node] < 0 ? 0 : depths[parents[node]] + 1;
      deepest = std::max(deepest, depths[node]);
    }
  }
  int64_t units() const { return x.sequences * x.groups * blocks; }
  Block block(int64_t unit) const {
    int64_t n = unit / blocks / x.groups, first = unit % blocks * ROWS;
    int64_t prefix = (x.key_lengths ? *x.key_lengths.at<int64_t>(n) : x.keys) - x.length;
    Block block{n, unit / blocks % x.groups, first, std::min(ROWS, rows - first), prefix, 0};
    block.begin = std::min(first_key(block, deepest), prefix);
    return block;
  }
  // The first key in the window of a node with so many ancestors.
  int64_t first_key(const Block& block, int64_t depth) const {
    return std::max<int64_t>(block.prefix + depth - x.window + 1, 0);
  }
  int64_t depth(int64_t node) const { return depths[node]; }
  int64_t head(const Block& block, int64_t row) const {
    return block.group * (x.heads / x.groups) + (block.first + row) / x.length;
  }
  int64_t node(const Block& block, int64_t row) const { return (block.first + row) % x.length; }
  // What a part leaves of a block: m and l of all rows, and their sums over v.
  int64_t left() const { return ROWS * (2 + value_width); }
  int64_t longest() const { return round_up(2 * (deepest + 1), LANES); }
};

struct Sums {
  float *m, *l, *o;  // [ROWS], [ROWS], [ROWS, V]
  explicit Sums(float* left) : m(left), l(left + ROWS), o(left + 2 * ROWS) {}
};

// The queries of a block as rows, times scale / ln 2; zeros beyond the last one.
void read_queries(const Arguments& x, const Plan& plan, const Block& block, float* to) {
  std::memset(to, 0, ROWS * plan.key_width * 4);
  const float scale = float(x.scale * LOG2E);
  with_type(x.q, [&](auto number) {
    using Number = decltype(number);
    for (int64_t row = 0; row < block.count; row++) {
      const Number* from = x.q.at<Number>(block.n, plan.node(block, row), plan.head(block, row));
      for (int64_t c = 0; c < plan.key_width; c += LANES)
        store(to + row * plan.key_width + c, load_some(from + c, x.channels - c) * scale);
    }
  });
}

// Neighbouring tokens as rows of float32: where they lie, or copied to `room`, zeros behind the last channel and token.
Matrix tokens(const Tensor& from, const Block& block, int64_t first, int64_t count, int64_t channels, bool in_place,
              float* room) {
  if (in_place && from.type == Type::float32) return {from.at<float>(block.n, first, block.group), from.stride[1], 1};
  const int64_t width = round_up(channels, LANES);
  with_type(from, [&](auto number) {
    using Number = decltype(number);
    for (int64_t j = 0; j < count; j++) {
      const Number* token = from.at<Number>(block.n, first + j, block.group);
      for (int64_t c = 0; c < width; c += LANES) store(room + j * width + c, load_some(token + c, channels - c));
    }
  });
  for (int64_t i = count * width; i < round_up(count, TILE_ROWS) * width; i += LANES) store(room + i, zeros());
  return {room, width, 1};
}

// Scores [count, lanes] of a block of keys become weights under the new maxima m; l and o so far fade to these.
void weigh(float* scores, int64_t count, int64_t lanes, int64_t value_width, const Sums& sums) {
  for (int64_t i = 0; i < lanes; i += LANES) {
    Vec before = load(sums.m + i), m = before, l = zeros();
    for (int64_t j = 0; j < count; j++) m = max(m, load(scores + j * lanes + i));
    for (int64_t j = 0; j < count; j++) {
      Vec weight = exp2(load(scores + j * lanes + i) - m);
      store(scores + j * lanes + i, weight);
      l += weight;
    }
    Vec fade = exp2(before - m);
    store(sums.m + i, m);
    store(sums.l + i, load(sums.l + i) * fade + l);
    for (int64_t row = 0; row < LANES; row++)
      if (fade[row] != 1.0f)
        for (int64_t c = 0; c < value_width; c += LANES) {
          float* o = sums.o + (i + row) * value_width + c;
          store(o, load(o) * fade[row]);
        }
  }
}

// What the keys of one part that all nodes see give to a block of rows.
void attend(const Arguments& x, const Plan& plan, const Block& block, int64_t part, const Sums& sums) {
  const int64_t lanes = round_up(block.count, LANES), begin = std::max(block.begin, part * PART);
  const int64_t end = std::min(block.prefix, (part + 1) * PART);
  std::fill(sums.m, sums.m + ROWS, LOWEST);
  std::fill(sums.l, sums.l + ROWS * (1 + plan.value_width), 0.0f);
  if (begin >= end) return;
  Scratch scratch(4 * (ROWS * 2 * plan.key_width + KEYS * (ROWS + plan.key_width + plan.value_width)) + 5 * 64);
  float *rows = scratch.take(ROWS * plan.key_width), *columns = scratch.take(ROWS * plan.key_width);
  float *scores = scratch.take(KEYS * ROWS), *keys = scratch.take(KEYS * plan.key_width);
  float* values = scratch.take(KEYS * plan.value_width);
  read_queries(x, plan, block, rows);
  transpose(columns, lanes, rows, plan.key_width, lanes, plan.key_width);
  for (int64_t j = begin; j < end; j += KEYS) {
    const int64_t count = std::min(KEYS, end - j), filled = round_up(count, TILE_ROWS);
    Matrix k = tokens(x.k, block, j, count, x.channels, count == filled, keys);
    multiply(scores, lanes, k, columns, lanes, filled, lanes, x.channels);
    weigh(scores, count, lanes, plan.value_width, sums);
    Matrix v = tokens(x.v, block, j, count, x.width, x.width == plan.value_width, values);
    const int64_t into = round_up(block.count, TILE_ROWS);
    multiply<Into::result>(sums.o, plan.value_width, {scores, 1, lanes}, v.data, v.row, into, plan.value_width, count);
  }
}

// The keys that a row takes for itself: of the prefix those before `block.begin`, then the node and its ancestors.
int64_t own_keys(const Arguments& x, const Plan& plan, const Block& block, int64_t node, int64_t* to) {
  int64_t count = 0, nearest = node;
  for (int64_t key = plan.first_key(block, plan.depth(node)); key < block.begin; key++) to[count++] = key;
  for (int64_t distance = 0; nearest >= 0 && distance < x.window; distance++) {
    to[count++] = block.prefix + nearest;
    nearest = x.parents.at<int64_t>()[nearest];
  }
  return count;
}

// Scores of a query with these keys, -infinity behind the last one.
void score(const Arguments& x, const Block& block, const float* q, const int64_t* keys, int64_t count, float* scores) {
  with_type(x.k, [&](auto number) {
    using Number = decltype(number);
    for (int64_t j = 0; j < count; j += LANES) {
      Vec products[LANES] = {};
      for (int64_t i = 0; i < std::min<int64_t>(LANES, count - j); i++) {
        const Number* key = x.k.at<Number>(block.n, keys[j + i], block.group);
        for (int64_t c = 0; c < x.channels; c += LANES) products[i] += load(q + c) * load_some(key + c, x.channels - c);
      }
      store(scores + j, select(lane_numbers() < int32_t(count - j), sums(products), broadcast(-__builtin_inff())));
    }
  });
}

// The parts' sums of a row, in part 0, become one, with those of its own keys.
void finish(const Arguments& x, const Plan& plan, const Block& block, int64_t row, float* left, const float* q,
            const int64_t* keys, int64_t count, float* weights) {
  score(x, block, q, keys, count, weights);
  float m = LOWEST, l = 0.0f;
  for (int64_t part = 0; part < plan.parts; part++) m = std::max(m, Sums(left + part * plan.left()).m[row]);
  for (int64_t j = 0; j < count; j += LANES) m = std::max(m, largest(load(weights + j)));
  float* o = Sums(left).o + row * plan.value_width;
  for (int64_t part = 0; part < plan.parts; part++) {
    Sums its(left + part * plan.left());
    const float share = exp2(broadcast(its.m[row] - m))[0];
    l += share * its.l[row];
    for (int64_t c = 0; c < plan.value_width; c += LANES)
      store(o + c, (part ? load(o + c) : zeros()) + share * load(its.o + row * plan.value_width + c));
  }
  for (int64_t j = 0; j < count; j += LANES) {
    Vec weight = exp2(load(weights + j) - m);
    store(weights + j, weight);
    l += sum(weight);
  }
  const int64_t node = plan.node(block, row), head = plan.head(block, row);
  with_type(x.v, [&](auto number) {
    using Number = decltype(number);
    for (int64_t c = 0; c < plan.value_width; c += LANES) {
      Vec total = load(o + c);
      for (int64_t j = 0; j < count; j++)
        total += weights[j] * load_some(x.v.at<Number>(block.n, keys[j], block.group) + c, x.width - c);
      store(o + c, l == 0.0f ? zeros() : total / l);
    }
  });
  write(x.o, block.n * x.o.stride[0] + node * x.o.stride[1] + head * x.o.stride[2], o, x.width, 1);
  *x.lse.at<float>(block.n, node, head) = l == 0.0f ? -__builtin_inff() : m / LOG2E + log(broadcast(l))[0];
}

void merge(const Arguments& x, const Plan& plan, const Block& block, float* left) {
  Scratch scratch(4 * (ROWS * plan.key_width + plan.longest()) + 8 * plan.longest() + 3 * 64);
  float *rows = scratch.take(ROWS * plan.key_width), *weights = scratch.take(plan.longest());
  int64_t* keys = scratch.take<int64_t>(plan.longest());
  read_queries(x, plan, block, rows);
  for (int64_t row = 0; row < block.count; row++) {
    int64_t count = own_keys(x, plan, block, plan.node(block, row), keys);
    finish(x, plan, block, row, left, rows + row * plan.key_width, keys, count, weights);
  }
}

}  // namespace

KERNEL(tree_softmax, Arguments) {
  const Arguments& x = arguments;
  if (x.length == 0) return;
  const Plan plan(x);
  const int64_t units = plan.units(), operations = x.sequences * x.heads * x.length * x.keys * (x.channels + x.width);
  std::unique_ptr<float[]> left(new float[units * plan.parts * plan.left()]);
  parallel_if_much(units * plan.parts, operations, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      attend(x, plan, plan.block(i / plan.parts), i % plan.parts, Sums(left.get() + i * plan.left()));
  });
  parallel_if_much(units, operations, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) merge(x, plan, plan.block(i), left.get() + i * plan.parts * plan.left());
  });
}

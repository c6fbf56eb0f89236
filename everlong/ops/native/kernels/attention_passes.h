// The two passes of softmax attention: in which order queries and keys meet. What is computed where they meet is given
// by an `Arithmetic`, in float32 (softmax_attention.cpp) or with products of bfloat16 (softmax_attention_bf16.cpp):
//
//     EDGE, WIDTH     keys of a piece at the edge of what queries see; what channels are filled up to, in numbers
//     PANEL           queries of a unit of work: their blocks share the keys that were read
//     Keys            a block of keys as it is read, and room for the weights of a piece
//     Queries         a block of queries on its way over the keys, forward
//     Gradients       the same backward
//     Registers       lives in each thread while it multiplies
#pragma once
#include "attention.h"

#include <thread>

struct Forward {
  Attention attention;
  Tensor o, lse;  // [B, T, H, V], float32 [B, T, H]
};

struct Backward {
  Attention attention;
  Tensor o, lse, d_o, d_lse;  // d_lse may be none
  Tensor d_q, d_k, d_v;       // d_k and d_v float32, and 0
};

enum class Pass { forward, backward };

// Channels of a key and of a value, filled up.
struct Widths {
  int64_t key, value;
};
template <class Arithmetic>
Widths widths_of(const Attention& x) {
  return {round_up(x.key_channels, Arithmetic::WIDTH), round_up(x.value_channels, Arithmetic::WIDTH)};
}

// Tokens of one head as rows of float32, `width` apart; channels beyond the last and rows up to `padded` are 0.
inline void read_rows(float* to, int64_t width, int64_t padded, const Tensor& from, int64_t row, Span tokens,
                      int64_t head, int64_t channels, float scale = 1.0f) {
  for (int64_t i = 0; i < tokens.size(); i++) {
    float* its = to + i * width;
    int64_t place = row * from.stride[0] + (tokens.begin + i) * from.stride[1] + head * from.stride[2];
    read(its, from, place, channels, from.stride[3]);
    std::fill(its + channels, its + width, 0.0f);
    if (scale != 1.0f)
      for (int64_t c = 0; c < width; c += LANES) store(its + c, load(its + c) * scale);
  }
  std::fill(to + tokens.size() * width, to + padded * width, 0.0f);
}
inline void write_rows(const Tensor& to, int64_t row, Span tokens, int64_t head, int64_t channels, const float* from,
                       int64_t width) {
  for (int64_t i = 0; i < tokens.size(); i++) {
    int64_t place = row * to.stride[0] + (tokens.begin + i) * to.stride[1] + head * to.stride[2];
    write(to, place, from + i * width, channels, to.stride[3]);
  }
}

// Sums over the keys of a block of queries, transposed, as the forward pass leaves them.
struct Sums {
  float *o, *top, *total;  // [V, QUERIES]; [QUERIES] twice, `top` the base-2 logarithm of what all was divided by

  static int64_t bytes(Widths w) { return 4 * QUERIES * (w.value + 2); }
  void take(Widths w, Scratch& scratch) {
    o = scratch.take(w.value * QUERIES);
    top = scratch.take(QUERIES);
    total = scratch.take(QUERIES);
  }
  void clear(Widths w) {
    std::fill(o, o + w.value * QUERIES, 0.0f);
    std::fill(top, top + QUERIES, -INFINITE);
    std::fill(total, total + QUERIES, 0.0f);
  }
  // Writes o and lse; `rows` [QUERIES, V] is room.
  void finish(const Forward& f, const Meeting& m, int64_t head, Span queries, int64_t width, float* rows) {
    for (int64_t lane = 0; lane < QUERIES; lane += LANES) {
      Vec sum = load(total + lane), share = sum == 0.0f ? zeros() : 1.0f / sum;
      for (int64_t c = 0; c < f.attention.value_channels; c++) {
        float* place = o + c * QUERIES + lane;
        store(place, load(place) * share);
      }
      store(total + lane, sum == 0.0f ? broadcast(-INFINITE) : load(top + lane) * (1.0f / LOG2E) + log(sum));
    }
    transpose(rows, width, o, QUERIES, width, QUERIES);
    Span tokens = {m.start + queries.begin, m.start + queries.end};
    write_rows(f.o, m.row, tokens, head, f.attention.value_channels, rows, width);
    for (int64_t i = 0; i < queries.size(); i++) *f.lse.at<float>(m.row, tokens.begin + i, head) = total[i];
  }
};

template <class Arithmetic>
void forward(const Forward& f, const Unit& unit, Scratch scratch) {
  const Attention& x = f.attention;
  Meeting m = x.meeting(unit.n);
  Widths widths = widths_of<Arithmetic>(x);
  typename Arithmetic::Keys keys(widths, scratch);
  typename Arithmetic::Queries blocks[Arithmetic::PANEL / QUERIES];
  int64_t count = 0;
  for (int64_t i = unit.queries.begin; i < unit.queries.end; i += QUERIES) {
    blocks[count].take(widths, scratch);
    blocks[count++].begin(x, m, unit.head, {i, std::min(i + QUERIES, unit.queries.end)}, keys);
  }
  Span reach = x.reach(m, unit.queries);
  for (int64_t j = reach.begin / KEYS * KEYS; j < reach.end; j += KEYS) {
    Span span = {j, std::min(j + KEYS, m.keys)};
    keys.read(x, m, unit.head / x.shared(), span, Pass::forward);
    for (int64_t b = 0; b < count; b++) {
      Piece piece(x, m, unit.head, blocks[b].queries.begin);
      for_pieces(x, m, piece, blocks[b].queries, span, Arithmetic::EDGE,
                 [&] { blocks[b].add(x, piece, piece.keys.begin - j, keys); });
    }
  }
  for (int64_t b = 0; b < count; b++) blocks[b].finish(f, m, unit.head, keys);
}

template <class Arithmetic>
void forward(const Forward& f) {
  const Attention& x = f.attention;
  Widths widths = widths_of<Arithmetic>(x);
  std::vector<Unit> units = units_of(x, Arithmetic::PANEL);
  int64_t room = Arithmetic::Keys::bytes(widths) + Arithmetic::PANEL / QUERIES * Arithmetic::Queries::bytes(widths);
  parallel_queue(int64_t(units.size()), [&](auto next) {
    Scratch scratch(room);
    [[maybe_unused]] typename Arithmetic::Registers registers;
    for (int64_t i = next(); i < int64_t(units.size()); i = next()) forward<Arithmetic>(f, units[i], scratch);
  });
}

// A block of keys' gradients, summed over the queries of a unit.
struct KeyGradients {
  Widths widths;
  float *keys, *values;  // [KEYS, channels], those of keys over the scale

  static int64_t bytes(Widths w) { return 4 * KEYS * (w.key + w.value); }
  KeyGradients(Widths w, Scratch& scratch)
      : widths(w), keys(scratch.take(KEYS * w.key)), values(scratch.take(KEYS * w.value)) {}
  void clear() {
    std::fill(keys, keys + KEYS * widths.key, 0.0f);
    std::fill(values, values + KEYS * widths.value, 0.0f);
  }
  void add_to(const Backward& b, int64_t row, Span tokens, int64_t group) const {
    add(b.d_k, keys, widths.key, b.attention.key_channels, row, tokens, group, float(b.attention.scale));
    add(b.d_v, values, widths.value, b.attention.value_channels, row, tokens, group, 1.0f);
  }

 private:
  static void add(const Tensor& to, const float* from, int64_t width, int64_t channels, int64_t row, Span tokens,
                  int64_t group, float scale) {
    for (int64_t i = 0; i < tokens.size(); i++) {
      float* place = to.at<float>(row, tokens.begin + i, group);
      for (int64_t c = 0; c < channels; c += LANES)
        store_some(place + c, load_some(place + c, channels - c) + scale * load(from + i * width + c), channels - c);
    }
  }
};

// What the backward pass knows of a block of queries beside q and g, and the gradient of q.
struct RowSums {
  float *lse, *delta;  // [QUERIES]; lse / ln 2
  float* d_q;          // dq^T / scale: [K, QUERIES]

  static int64_t bytes(Widths w) { return 4 * QUERIES * (w.key + 2); }
  void take(Widths w, Scratch& scratch) {
    lse = scratch.take(QUERIES);
    delta = scratch.take(QUERIES);
    d_q = scratch.take(w.key * QUERIES);
  }
  // `g` [QUERIES, V] is the gradient of o, `rows` [QUERIES, V] room.
  void begin(const Backward& b, const Meeting& m, int64_t head, Span queries, Widths w, const float* g, float* rows) {
    Span tokens = {m.start + queries.begin, m.start + queries.end};
    read_rows(rows, w.value, QUERIES, b.o, m.row, tokens, head, b.attention.value_channels);
    for (int64_t i = 0; i < QUERIES; i++) {
      bool there = i < queries.size();
      float of_lse = there ? *b.lse.at<float>(m.row, tokens.begin + i, head) : 0.0f;
      lse[i] = of_lse == -INFINITE ? 0.0f : of_lse * LOG2E;
      Vec products = zeros();
      for (int64_t c = 0; c < w.value; c += LANES) products += load(rows + i * w.value + c) * load(g + i * w.value + c);
      delta[i] = sum(products);
      if (there && b.d_lse) delta[i] -= *b.d_lse.at<float>(m.row, tokens.begin + i, head);
    }
    std::fill(d_q, d_q + w.key * QUERIES, 0.0f);
  }
  // Writes the gradient of q; `rows` [QUERIES, K] is room.
  void finish(const Backward& b, const Meeting& m, int64_t head, Span queries, int64_t width, float* rows) {
    for (int64_t i = 0; i < width * QUERIES; i += LANES) store(d_q + i, load(d_q + i) * float(b.attention.scale));
    transpose(rows, width, d_q, QUERIES, width, QUERIES);
    Span tokens = {m.start + queries.begin, m.start + queries.end};
    write_rows(b.d_q, m.row, tokens, head, b.attention.key_channels, rows, width);
  }
};

// How far a unit has come with adding to the gradients of keys: all from this place on are done. A unit adds to a key
// after the unit before it, so sums have one order whatever the threads. All go from the last key to the first: under a
// causal rule a later unit begins with keys that the one before it does not see, and follows it without waiting.
using Progress = std::atomic<int64_t>;

template <class Arithmetic>
void backward(const Backward& b, const Unit& unit, const Progress* before, Progress& done, Scratch scratch) {
  const Attention& x = b.attention;
  Meeting m = x.meeting(unit.n);
  Widths widths = widths_of<Arithmetic>(x);
  typename Arithmetic::Keys keys(widths, scratch);
  typename Arithmetic::Gradients blocks[Arithmetic::PANEL / QUERIES];
  KeyGradients sums(widths, scratch);
  int64_t count = 0, group = unit.head / x.shared();
  for (int64_t i = unit.queries.begin; i < unit.queries.end; i += QUERIES) {
    blocks[count].take(widths, scratch);
    blocks[count++].begin(b, m, unit.head, {i, std::min(i + QUERIES, unit.queries.end)}, keys);
  }
  Span reach = x.reach(m, unit.queries);
  for (int64_t j = (reach.end - 1) / KEYS * KEYS; !reach.empty() && j + KEYS > reach.begin; j -= KEYS) {
    Span span = {j, std::min(j + KEYS, m.keys)};
    keys.read(x, m, group, span, Pass::backward);
    sums.clear();
    for (int64_t i = 0; i < count; i++) {
      Piece piece(x, m, unit.head, blocks[i].queries.begin);
      for_pieces(x, m, piece, blocks[i].queries, span, Arithmetic::EDGE,
                 [&] { blocks[i].add(x, piece, piece.keys.begin - j, keys, sums); });
    }
    while (before && before->load(std::memory_order_acquire) > j) std::this_thread::yield();
    sums.add_to(b, m.row, {m.start + span.begin, m.start + span.end}, group);
    done.store(j, std::memory_order_release);
  }
  for (int64_t i = 0; i < count; i++) blocks[i].finish(b, m, unit.head, keys);
}

template <class Arithmetic>
void backward(const Backward& b) {
  const Attention& x = b.attention;
  Widths widths = widths_of<Arithmetic>(x);
  std::vector<Unit> units = units_of(x, Arithmetic::PANEL);
  std::vector<Progress> progress(units.size());
  for (size_t i = 0; i < units.size(); i++)
    progress[i] = round_up(std::max<int64_t>(x.reach(x.meeting(units[i].n), units[i].queries).end, 0), KEYS);
  int64_t room = Arithmetic::Keys::bytes(widths) + KeyGradients::bytes(widths) +
                 Arithmetic::PANEL / QUERIES * Arithmetic::Gradients::bytes(widths);
  parallel_queue(int64_t(units.size()), [&](auto next) {
    Scratch scratch(room);
    [[maybe_unused]] typename Arithmetic::Registers registers;
    for (int64_t i = next(); i < int64_t(units.size()); i = next())
      backward<Arithmetic>(b, units[i], units[i].first ? nullptr : &progress[i - 1], progress[i], scratch);
  });
}

// Whether the processor multiplies bfloat16 numbers itself; otherwise they are read as float32.
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
constexpr bool MULTIPLIES_BFLOAT16 = true;
#else
constexpr bool MULTIPLIES_BFLOAT16 = false;
#endif
// The forward pass of few queries, whose keys are worth being split.
void decode(const Forward& f);

void forward_in_bfloat16(const Forward& f);
void backward_in_bfloat16(const Backward& b);

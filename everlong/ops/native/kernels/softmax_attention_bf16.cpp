// Softmax attention of bfloat16 numbers by products of bfloat16, summed in float32; the equations are those of
// softmax_attention.cpp. Weights and gradients of scores are rounded to bfloat16 before they are multiplied; maxima, sums
// and exponents are float32.
#include "attention_passes.h"
#include "tiles.h"

namespace {

// All bits of each number of these pairs that is an infinity or NaN.
INLINE Words infinite_numbers(Words pairs) {
  Words first = (pairs & 0x7f80u) == 0x7f80u ? Words{} + 0xffffu : Words{};
  Words second = (pairs & 0x7f800000u) == 0x7f800000u ? Words{} + 0xffff0000u : Words{};
  return first | second;
}

// Tokens of one head as rows of bfloat16, `width` apart; channels beyond the last and rows up to `padded` are 0. Whether
// all are finite.
bool copy_rows(bfloat16* to, int64_t width, int64_t padded, const Tensor& from, int64_t row, Span tokens, int64_t head,
               int64_t channels) {
  for (int64_t i = 0; i < tokens.size(); i++) {
    const bfloat16* its = from.at<const bfloat16>(row, tokens.begin + i, head);
    bfloat16* place = to + i * width;
    if (from.stride[3] == 1) {
      std::memcpy(place, its, channels * sizeof *its);
    } else {
      for (int64_t c = 0; c < channels; c++) place[c] = its[c * from.stride[3]];
    }
    std::fill(place + channels, place + width, bfloat16{0});
  }
  std::fill(to + tokens.size() * width, to + padded * width, bfloat16{0});
  Words infinite = {};
  for (int64_t i = 0; i < tokens.size() * width; i += 2 * LANES) infinite |= infinite_numbers(load_pairs(to + i));
  return sum(select(infinite != 0u, broadcast(1.0f), zeros())) == 0.0f;
}

// rows x words of pairs, of which only the finite numbers or only the others are left; those in their place are 0.
enum class Keep { finite, infinite };
template <Keep KEEP>
void keep(Pair* to, const Pair* from, int64_t from_row, int64_t rows, int64_t words) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < words; j += LANES) {
      Words pairs = load_pairs(from + i * from_row + j), infinite = infinite_numbers(pairs);
      store_pairs(to + i * words + j, pairs & (KEEP == Keep::finite ? ~infinite : infinite));
    }
}

enum class Weights { left, right };

// C += A B where the weights are A or B and the other holds infinities or NaN. A weight of 0 takes nothing of these: what
// a query does not see cannot reach it, and the rest is summed as it would be without them. `room`: as large as the other.
template <Weights WEIGHTS>
void add_seen(float* c, int64_t c_row, int64_t rows, int64_t columns, Product x, Pair* room) {
  constexpr bool LEFT = WEIGHTS == Weights::left;
  const Pair* from = LEFT ? x.b : reinterpret_cast<const Pair*>(x.a);
  int64_t from_row = LEFT ? x.b_row : x.a_row / 2, height = LEFT ? x.depth / 2 : rows, words = LEFT ? columns : x.depth / 2;
  if (LEFT) {
    x.b = room;
    x.b_row = words;
  } else {
    x.a = reinterpret_cast<const bfloat16*>(room);
    x.a_row = 2 * words;
  }
  keep<Keep::finite>(room, from, from_row, height, words);
  multiply<Into::result>(c, c_row, rows, columns, x);
  keep<Keep::infinite>(room, from, from_row, height, words);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j += LANES) {
      Vec total = load(c + i * c_row + j);
      for (int64_t k = 0; k < x.depth; k++) {
        Vec of_a = broadcast(widen(x.a[i * x.a_row + k]));
        Words pairs = load_pairs(x.b + k / 2 * x.b_row + j);
        Vec of_b = k % 2 ? seconds(pairs) : firsts(pairs);
        total = select((LEFT ? of_a : of_b) != 0.0f, total + of_a * of_b, total);
      }
      store(c + i * c_row + j, total);
    }
}

struct InBfloat16 {
  static constexpr int64_t EDGE = 32, WIDTH = 32, PANEL = 256;
  using Registers = TileRegisters;
  struct Keys;
  struct Queries;
  struct Gradients;
};

struct InBfloat16::Keys {
  Widths widths;
  bfloat16 *keys, *values;                // [KEYS, channels]
  bfloat16 *keys_turned, *values_turned;  // [channels, KEYS]
  Pair* pairs;                            // [channels / 2, KEYS], room
  float *scores, *d_weights;              // [KEYS, QUERIES]
  bfloat16 *weights, *d_scores;           // [KEYS, QUERIES]
  Pair* paired;                           // [KEYS / 2, QUERIES]: the weights, or d_scores
  float *rows, *g_rows;                   // [QUERIES, channels]
  bool finite_keys, finite_values;

  static int64_t bytes(Widths w) {
    int64_t wider = std::max(w.key, w.value);
    return 4 * KEYS * (w.key + w.value) + 2 * KEYS * wider + 14 * KEYS * QUERIES + 8 * QUERIES * wider;
  }
  Keys(Widths w, Scratch& scratch) : widths(w) {
    int64_t wider = std::max(w.key, w.value);
    for (bfloat16** piece : {&keys, &keys_turned}) *piece = scratch.take<bfloat16>(KEYS * w.key);
    for (bfloat16** piece : {&values, &values_turned}) *piece = scratch.take<bfloat16>(KEYS * w.value);
    pairs = scratch.take<Pair>(wider / 2 * KEYS);
    for (float** piece : {&scores, &d_weights}) *piece = scratch.take(KEYS * QUERIES);
    for (bfloat16** piece : {&weights, &d_scores}) *piece = scratch.take<bfloat16>(KEYS * QUERIES);
    paired = scratch.take<Pair>(KEYS / 2 * QUERIES);
    for (float** piece : {&rows, &g_rows}) *piece = scratch.take(QUERIES * wider);
  }
  void read(const Attention& x, const Meeting& m, int64_t group, Span span, Pass pass) {
    Span tokens = {m.start + span.begin, m.start + span.end};
    finite_keys = copy_rows(keys, widths.key, KEYS, x.k, m.row, tokens, group, x.key_channels);
    finite_values = copy_rows(values, widths.value, KEYS, x.v, m.row, tokens, group, x.value_channels);
    if (pass == Pass::forward) {
      turn(values_turned, values, widths.value);
    } else {
      turn(keys_turned, keys, widths.key);
    }
  }

 private:
  void turn(bfloat16* to, const bfloat16* from, int64_t width) const {
    transpose(pairs, KEYS, from, width, KEYS, width);
    unpair_rows(to, KEYS, pairs, KEYS, width, KEYS);
  }
};

struct InBfloat16::Queries {
  Span queries;
  Pair* q;  // transposed, in pairs: [K / 2, QUERIES]
  Sums sums;

  static int64_t bytes(Widths w) { return 2 * QUERIES * w.key + Sums::bytes(w); }
  void take(Widths w, Scratch& scratch) {
    q = scratch.take<Pair>(w.key / 2 * QUERIES);
    sums.take(w, scratch);
  }
  void begin(const Attention& x, const Meeting& m, int64_t head, Span its, const Keys& room) {
    queries = its;
    Span tokens = {m.start + its.begin, m.start + its.end};
    int64_t width = room.widths.key;
    copy_rows(room.keys, width, QUERIES, x.q, m.row, tokens, head, x.key_channels);
    transpose(q, QUERIES, room.keys, width, QUERIES, width);
    sums.clear(room.widths);
  }

  // Takes up a piece of the keys, which begins at the block's key `first`.
  void add(const Attention& x, const Piece& piece, int64_t first, const Keys& block) {
    int64_t rows = round_up(piece.keys.size(), EDGE), columns = piece.lanes.size(), lane = piece.lanes.begin;
    const bfloat16* keys = block.keys + first * block.widths.key;
    multiply(block.scores + lane, QUERIES, rows, columns, {keys, block.widths.key, q + lane, QUERIES, block.widths.key});
    for (; lane < piece.lanes.end; lane += LANES) weigh(piece, rows, lane, float(x.scale * LOG2E), block);

    lane = piece.lanes.begin;
    Product mixed = {block.values_turned + first, KEYS, block.paired + lane, QUERIES, rows};
    if (piece.whole || block.finite_values) {
      multiply<Into::result>(sums.o + lane, QUERIES, block.widths.value, columns, mixed);
    } else {
      add_seen<Weights::right>(sums.o + lane, QUERIES, block.widths.value, columns, mixed, block.pairs);
    }
  }

  void finish(const Forward& f, const Meeting& m, int64_t head, const Keys& room) {
    sums.finish(f, m, head, queries, room.widths.value, room.rows);
  }

 private:
  // The weights of LANES queries, and what they had so far divided anew.
  void weigh(const Piece& piece, int64_t rows, int64_t lane, float scale, const Keys& block) {
    float* scores = block.scores + lane;
    Vec before = load(sums.top + lane), now = before, total = zeros();
    for (int64_t i = 0; i < rows; i++) {
      Vec score = load(scores + i * QUERIES) * scale;
      if (!piece.whole) {
        score = select(piece.seen(i, lane), score, broadcast(-INFINITE));
        store(scores + i * QUERIES, score);
      }
      now = max(now, score);
    }
    Vec base = now == -INFINITE ? zeros() : now, by = broadcast(piece.whole ? scale : 1.0f);
    for (int64_t i = 0; i < rows; i += 2) {
      Vec a = exp2(load(scores + i * QUERIES) * by - base), b = exp2(load(scores + (i + 1) * QUERIES) * by - base);
      total += a + b;
      store_pairs(block.paired + i / 2 * QUERIES + lane, pairs_of(a, b));
    }
    Vec share = exp2(before - base);
    store(sums.top + lane, now);
    store(sums.total + lane, share * load(sums.total + lane) + total);
    if (sum(select(share != 1.0f, broadcast(1.0f), zeros())) == 0.0f) return;
    for (int64_t c = 0; c < block.widths.value; c++) {
      float* place = sums.o + c * QUERIES + lane;
      store(place, load(place) * share);
    }
  }
};

struct InBfloat16::Gradients {
  Widths widths;
  Span queries;
  Pair *q, *g;                // [QUERIES / 2, channels]
  Pair *q_turned, *g_turned;  // [channels / 2, QUERIES]
  RowSums its;
  bool finite_q, finite_g;

  static int64_t bytes(Widths w) { return 4 * QUERIES * (w.key + w.value) + RowSums::bytes(w); }
  void take(Widths w, Scratch& scratch) {
    widths = w;
    for (Pair** piece : {&q, &q_turned}) *piece = scratch.take<Pair>(w.key / 2 * QUERIES);
    for (Pair** piece : {&g, &g_turned}) *piece = scratch.take<Pair>(w.value / 2 * QUERIES);
    its.take(w, scratch);
  }
  void begin(const Backward& b, const Meeting& m, int64_t head, Span all, const Keys& room) {
    const Attention& x = b.attention;
    queries = all;
    Span tokens = {m.start + all.begin, m.start + all.end};
    finite_q = copy_rows(room.keys, widths.key, QUERIES, x.q, m.row, tokens, head, x.key_channels);
    transpose(q_turned, QUERIES, room.keys, widths.key, QUERIES, widths.key);
    pair_rows(q, widths.key, room.keys, widths.key, QUERIES, widths.key);
    finite_g = copy_rows(room.values, widths.value, QUERIES, b.d_o, m.row, tokens, head, x.value_channels);
    transpose(g_turned, QUERIES, room.values, widths.value, QUERIES, widths.value);
    pair_rows(g, widths.value, room.values, widths.value, QUERIES, widths.value);
    read_rows(room.g_rows, widths.value, QUERIES, b.d_o, m.row, tokens, head, x.value_channels);
    its.begin(b, m, head, all, widths, room.g_rows, room.rows);
  }

  void add(const Attention& x, const Piece& piece, int64_t first, const Keys& block, const KeyGradients& sums) {
    int64_t rows = round_up(piece.keys.size(), EDGE), columns = piece.lanes.size(), lane = piece.lanes.begin;
    const bfloat16 *keys = block.keys + first * widths.key, *values = block.values + first * widths.value;
    multiply(block.scores + lane, QUERIES, rows, columns, {keys, widths.key, q_turned + lane, QUERIES, widths.key});
    multiply(block.d_weights + lane, QUERIES, rows, columns,
             {values, widths.value, g_turned + lane, QUERIES, widths.value});
    for (; lane < piece.lanes.end; lane += 2 * LANES) weigh(piece, rows, lane, float(x.scale * LOG2E), block);

    lane = piece.lanes.begin;
    add_to_keys(sums.values + first * widths.value, widths.value, rows, block.weights + lane, g + lane / 2 * widths.value,
                columns, piece.whole || finite_g, block.pairs);
    add_to_keys(sums.keys + first * widths.key, widths.key, rows, block.d_scores + lane, q + lane / 2 * widths.key,
                columns, piece.whole || finite_q, block.pairs);
    Product to_queries = {block.keys_turned + first, KEYS, block.paired + lane, QUERIES, rows};
    if (piece.whole || block.finite_keys) {
      multiply<Into::result>(its.d_q + lane, QUERIES, widths.key, columns, to_queries);
    } else {
      add_seen<Weights::right>(its.d_q + lane, QUERIES, widths.key, columns, to_queries, block.pairs);
    }
  }

  void finish(const Backward& b, const Meeting& m, int64_t head, const Keys& room) {
    its.finish(b, m, head, queries, widths.key, room.rows);
  }

 private:
  // The weights and the gradients of scores of 2 LANES queries, these both in rows and in pairs.
  void weigh(const Piece& piece, int64_t rows, int64_t lane, float scale, const Keys& block) const {
    for (int64_t i = 0; i < rows; i += 2) {
      Vec weight[2][2], d_score[2][2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; r++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
          int64_t its_lane = lane + c * LANES, place = (i + r) * QUERIES + its_lane;
          Vec p = exp2(load(block.scores + place) * scale - load(its.lse + its_lane));
          Vec d = (load(block.d_weights + place) - load(its.delta + its_lane)) * p;
          if (!piece.whole) {
            Ints seen = piece.seen(i + r, its_lane);
            p = select(seen, p, zeros());
            d = select(seen, d, zeros());
          }
          weight[r][c] = p;
          d_score[r][c] = d;
        }
#pragma GCC unroll 2
      for (int r = 0; r < 2; r++) {
        store_pairs(block.weights + (i + r) * QUERIES + lane, consecutive(weight[r][0], weight[r][1]));
        store_pairs(block.d_scores + (i + r) * QUERIES + lane, consecutive(d_score[r][0], d_score[r][1]));
      }
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++)
        store_pairs(block.paired + i / 2 * QUERIES + lane + c * LANES, pairs_of(d_score[0][c], d_score[1][c]));
    }
  }

  // to[keys, width] += weights[keys, queries] from[queries, width]
  static void add_to_keys(float* to, int64_t width, int64_t rows, const bfloat16* weights, const Pair* from,
                          int64_t queries, bool all, Pair* room) {
    Product product = {weights, QUERIES, from, width, queries};
    if (all) {
      multiply<Into::result>(to, width, rows, width, product);
    } else {
      add_seen<Weights::left>(to, width, rows, width, product, room);
    }
  }
};

}  // namespace

void forward_in_bfloat16(const Forward& f) { forward<InBfloat16>(f); }
void backward_in_bfloat16(const Backward& b) { backward<InBfloat16>(b); }

// Softmax attention, o_i = sum_j P_ij v_j with P_i = softmax_j(scale q_i . k_j), and its gradients; no scores are kept.
//
// Forward, key block by key block, with S = K Q^T (base-2 logarithms of the weights) and running maxima m and sums l of
// each query:
//     m' = max(m, max_j S_j)    w = 2^(S - m')    l = 2^(m - m') l + sum_j w_j    O^T = 2^(m - m') O^T + V^T w
//     o = O / l                 lse = m ln 2 + ln l
// Backward, from lse, with g the gradient of o and delta_i = g_i . o_i - (gradient of lse_i):
//     P^T = 2^(S - lse / ln 2)       dS^T = P^T * (V g^T - delta)
//     dv += P^T g     dk += scale dS^T q     dq^T += scale K^T dS^T
#include "attention_passes.h"

namespace {

constexpr int64_t FEW = 16;  // queries of a head of keys for which a block of QUERIES would be mostly empty

enum class Weights { left, right };

// tile += A B where the weights are A or B. Unless all is seen, a weight of 0 takes nothing, not even of an infinite
// number: what a query does not see cannot reach it.
template <Weights WEIGHTS, int ROWS, int VECTORS>
INLINE void add_seen(Tile<ROWS, VECTORS>& tile, bool whole, Matrix a, const float* b, int64_t row, int64_t depth) {
  if (whole) return tile.add_product(a, b, row, depth);
  for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; j++) {
      Vec of_b = load(b + k * row + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        Vec of_a = broadcast(a.data[i * a.row + k * a.column]);
        Ints some = (WEIGHTS == Weights::left ? of_a : of_b) != 0.0f;
        tile.at[i][j] = select(some, tile.at[i][j] + of_a * of_b, tile.at[i][j]);
      }
    }
}

// What a query does not see becomes -infinity, or 0, in a tile of keys and queries.
template <int ROWS, int VECTORS>
INLINE void hide(Tile<ROWS, VECTORS>& tile, const Piece& piece, int64_t i, int64_t lane, float value) {
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < VECTORS; c++)
      tile.at[r][c] = select(piece.seen(i + r, lane + c * LANES), tile.at[r][c], broadcast(value));
}

struct InFloat32 {
  static constexpr int64_t EDGE = 16, WIDTH = LANES, PANEL = 128;
  struct Registers {};
  struct Keys;
  struct Queries;
  struct Gradients;
};

struct InFloat32::Keys {
  Widths widths;
  float *keys, *values;        // [KEYS, channels]
  float *weights, *d_scores;   // [KEYS, QUERIES]
  float* rows;                 // [QUERIES, channels]

  static int64_t bytes(Widths w) { return 4 * (KEYS * (w.key + w.value + 2 * QUERIES) + QUERIES * (w.key + w.value)); }
  Keys(Widths w, Scratch& scratch)
      : widths(w), keys(scratch.take(KEYS * w.key)), values(scratch.take(KEYS * w.value)),
        weights(scratch.take(KEYS * QUERIES)), d_scores(scratch.take(KEYS * QUERIES)),
        rows(scratch.take(QUERIES * std::max(w.key, w.value))) {}
  void read(const Attention& x, const Meeting& m, int64_t group, Span span, Pass) {
    Span tokens = {m.start + span.begin, m.start + span.end};
    int64_t padded = round_up(span.size(), EDGE);
    read_rows(keys, widths.key, padded, x.k, m.row, tokens, group, x.key_channels);
    read_rows(values, widths.value, padded, x.v, m.row, tokens, group, x.value_channels);
  }
};

struct InFloat32::Queries {
  Span queries;
  float* q;  // transposed, [K, QUERIES], times scale / ln 2
  Sums sums;

  static int64_t bytes(Widths w) { return 4 * QUERIES * w.key + Sums::bytes(w); }
  void take(Widths w, Scratch& scratch) {
    q = scratch.take(w.key * QUERIES);
    sums.take(w, scratch);
  }
  void begin(const Attention& x, const Meeting& m, int64_t head, Span its, const Keys& room) {
    queries = its;
    Span tokens = {m.start + its.begin, m.start + its.end};
    int64_t width = room.widths.key;
    read_rows(room.rows, width, QUERIES, x.q, m.row, tokens, head, x.key_channels, float(x.scale * LOG2E));
    transpose(q, QUERIES, room.rows, width, QUERIES, width);
    sums.clear(room.widths);
  }

  // Takes up a piece of the keys, which begins at the block's key `first`.
  void add(const Attention& x, const Piece& piece, int64_t first, const Keys& block) {
    const float *keys = block.keys + first * block.widths.key, *values = block.values + first * block.widths.value;
    float *weights = block.weights, *o = sums.o, *top = sums.top, *total = sums.total;
    int64_t count = piece.keys.size(), rows = round_up(count, TILE_ROWS), columns = piece.lanes.size();
    alignas(64) float new_top[QUERIES], old_share[QUERIES];
    std::copy(top, top + QUERIES, new_top);
    for_tiles(rows, columns, [&]<int ROWS, int VECTORS>(int64_t i, int64_t column) {
      int64_t lane = piece.lanes.begin + column, width = block.widths.key;
      Tile<ROWS, VECTORS> scores;
      scores.clear();
      scores.add_product({keys + i * width, width, 1}, q + lane, QUERIES, x.key_channels);
      if (!piece.whole) hide(scores, piece, i, lane, -INFINITE);
      scores.store(weights + i * QUERIES + lane, QUERIES);
      for (int c = 0; c < VECTORS; c++) {
        Vec largest = load(new_top + lane + c * LANES);
        for (int r = 0; r < ROWS; r++) largest = max(largest, scores.at[r][c]);
        store(new_top + lane + c * LANES, largest);
      }
    });

    for (int64_t lane = piece.lanes.begin; lane < piece.lanes.end; lane += LANES) {
      Vec now = load(new_top + lane), base = now == -INFINITE ? zeros() : now, sum = zeros();
      for (int64_t i = 0; i < rows; i++) {
        float* place = weights + i * QUERIES + lane;
        Vec weight = exp2(load(place) - base);
        store(place, weight);
        sum += weight;
      }
      Vec share = exp2(load(top + lane) - base);
      store(old_share + lane, share);
      store(total + lane, share * load(total + lane) + sum);
      store(top + lane, now);
    }

    for_tiles(round_up(x.value_channels, TILE_ROWS), columns, [&]<int ROWS, int VECTORS>(int64_t i, int64_t column) {
      int64_t lane = piece.lanes.begin + column;
      Tile<ROWS, VECTORS> mixed;
      mixed.load(o + i * QUERIES + lane, QUERIES);
      for (int c = 0; c < VECTORS; c++) {
        Vec share = load(old_share + lane + c * LANES);
        for (int r = 0; r < ROWS; r++) mixed.at[r][c] *= share;
      }
      add_seen<Weights::right>(mixed, piece.whole, {values + i, 1, block.widths.value}, weights + lane, QUERIES, count);
      mixed.store(o + i * QUERIES + lane, QUERIES);
    });
  }

  void finish(const Forward& f, const Meeting& m, int64_t head, const Keys& room) {
    sums.finish(f, m, head, queries, room.widths.value, room.rows);
  }
};

struct InFloat32::Gradients {
  Widths widths;
  Span queries;
  float *q, *g;                // [QUERIES, channels]
  float *q_turned, *g_turned;  // q^T times scale / ln 2, g^T: [channels, QUERIES]
  RowSums its;

  static int64_t bytes(Widths w) { return 8 * QUERIES * (w.key + w.value) + RowSums::bytes(w); }
  void take(Widths w, Scratch& scratch) {
    widths = w;
    for (float** piece : {&q, &q_turned}) *piece = scratch.take(w.key * QUERIES);
    for (float** piece : {&g, &g_turned}) *piece = scratch.take(w.value * QUERIES);
    its.take(w, scratch);
  }
  void begin(const Backward& b, const Meeting& m, int64_t head, Span all, const Keys& room) {
    const Attention& x = b.attention;
    queries = all;
    Span tokens = {m.start + all.begin, m.start + all.end};
    read_rows(q, widths.key, QUERIES, x.q, m.row, tokens, head, x.key_channels, float(x.scale * LOG2E));
    transpose(q_turned, QUERIES, q, widths.key, QUERIES, widths.key);
    read_rows(q, widths.key, QUERIES, x.q, m.row, tokens, head, x.key_channels);
    read_rows(g, widths.value, QUERIES, b.d_o, m.row, tokens, head, x.value_channels);
    transpose(g_turned, QUERIES, g, widths.value, QUERIES, widths.value);
    its.begin(b, m, head, all, widths, g, room.rows);
  }

  void add(const Attention& x, const Piece& piece, int64_t first, const Keys& block, const KeyGradients& sums) {
    const float *keys = block.keys + first * widths.key, *values = block.values + first * widths.value;
    weigh(x, piece, keys, values, block);
    add_to_keys(sums.values + first * widths.value, widths.value, piece, block.weights, g);
    add_to_keys(sums.keys + first * widths.key, widths.key, piece, block.d_scores, q);
    for_tiles(round_up(x.key_channels, TILE_ROWS), piece.lanes.size(), [&]<int ROWS, int VECTORS>(int64_t i, int64_t column) {
      int64_t lane = piece.lanes.begin + column;
      Tile<ROWS, VECTORS> tile;
      tile.load(its.d_q + i * QUERIES + lane, QUERIES);
      Matrix keys_turned = {keys + i, 1, widths.key};
      add_seen<Weights::right>(tile, piece.whole, keys_turned, block.d_scores + lane, QUERIES, piece.keys.size());
      tile.store(its.d_q + i * QUERIES + lane, QUERIES);
    });
  }

  void finish(const Backward& b, const Meeting& m, int64_t head, const Keys& room) {
    its.finish(b, m, head, queries, widths.key, room.rows);
  }

 private:
  // The piece's weights and the gradients of its scores.
  void weigh(const Attention& x, const Piece& piece, const float* keys, const float* values, const Keys& room) const {
    for_tiles(round_up(piece.keys.size(), TILE_ROWS), piece.lanes.size(), [&]<int ROWS, int VECTORS>(int64_t i, int64_t column) {
      int64_t lane = piece.lanes.begin + column;
      float *weights = room.weights + i * QUERIES + lane, *d_scores = room.d_scores + i * QUERIES + lane;
      Tile<ROWS, VECTORS> weight, d_score;
      weight.clear();
      weight.add_product({keys + i * widths.key, widths.key, 1}, q_turned + lane, QUERIES, x.key_channels);
      for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) weight.at[r][c] = exp2(weight.at[r][c] - load(its.lse + lane + c * LANES));
      if (!piece.whole) hide(weight, piece, i, lane, 0.0f);
      weight.store(weights, QUERIES);

      d_score.clear();
      d_score.add_product({values + i * widths.value, widths.value, 1}, g_turned + lane, QUERIES, x.value_channels);
      for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++)
          d_score.at[r][c] = (d_score.at[r][c] - load(its.delta + lane + c * LANES)) * load(weights + r * QUERIES + c * LANES);
      if (!piece.whole) hide(d_score, piece, i, lane, 0.0f);
      d_score.store(d_scores, QUERIES);
    });
  }

  // to[keys, width] += weights[keys, queries] from[queries, width]
  void add_to_keys(float* to, int64_t width, const Piece& piece, const float* weights, const float* from) const {
    int64_t lane = piece.lanes.begin, depth = std::min(piece.lanes.end, queries.size()) - lane;
    for_tiles(round_up(piece.keys.size(), TILE_ROWS), width, [&]<int ROWS, int VECTORS>(int64_t i, int64_t j) {
      Tile<ROWS, VECTORS> tile;
      tile.load(to + i * width + j, width);
      Matrix part = {weights + i * QUERIES + lane, QUERIES, 1};
      add_seen<Weights::left>(tile, piece.whole, part, from + lane * width + j, width, depth);
      tile.store(to + i * width + j, width);
    });
  }
};

}  // namespace

KERNEL(softmax_attention_forward, Forward) {
  const Attention& x = arguments.attention;
  if (x.length * x.shared() <= FEW && !x.cu_seqlens) {
    decode(arguments);
  } else if (MULTIPLIES_BFLOAT16 && x.q.type == Type::bfloat16) {
    forward_in_bfloat16(arguments);
  } else {
    forward<InFloat32>(arguments);
  }
}

KERNEL(softmax_attention_backward, Backward) {
  if (MULTIPLIES_BFLOAT16 && arguments.attention.q.type == Type::bfloat16) {
    backward_in_bfloat16(arguments);
  } else {
    backward<InFloat32>(arguments);
  }
}

// Softmax attention, o_i = sum_j P_ij v_j with P_i = softmax_j(scale q_i . k_j), and its gradients; no scores are kept.
//
// Forward, key block by key block, with S = K Q^T (base-2 logarithms of the weights) and running maxima m and sums l of
// each query:
//     m' = max(m, max_j S_j)    w = 2^(S - m')    l = 2^(m - m') l + sum_j w_j    O^T = 2^(m - m') O^T + V^T w
//     o = O / l                 lse = m ln 2 + ln l
// Backward, from lse, with g the gradient of o and delta_i = g_i . o_i - (gradient of lse_i):
//     P^T = 2^(S - lse / ln 2)       dS^T = P^T * (V g^T - delta)
//     dv += P^T g     dk += scale dS^T q     dq^T += scale K^T dS^T
#include "attention.h"

#include <thread>

namespace {

constexpr int64_t PANEL = 128;  // queries of a unit of work: their blocks share the keys that were read
constexpr int64_t BLOCKS = PANEL / QUERIES;
constexpr int64_t KEY_ROWS = KEYS + TILE_ROWS;  // a tile may begin at the last key

struct Forward {
  Attention attention;
  Tensor o, lse;  // [B, T, H, V], float32 [B, T, H]
};

struct Backward {
  Attention attention;
  Tensor o, lse, d_o, d_lse;  // d_lse may be none
  Tensor d_q, d_k, d_v;       // d_k and d_v float32, and 0
};

// A block of keys as both passes read it.
struct KeyBlock {
  float *keys, *values;  // [KEY_ROWS, K], [KEY_ROWS, V]

  static int64_t size(const Attention& x) { return KEY_ROWS * (x.key_width() + x.value_width()); }
  KeyBlock(const Attention& x, Scratch& scratch)
      : keys(scratch.take(KEY_ROWS * x.key_width())), values(scratch.take(KEY_ROWS * x.value_width())) {}
  void read(const Attention& x, const Meeting& m, int64_t head, Span block) {
    Span tokens = {m.start + block.begin, m.start + block.end};
    int64_t rows = round_up(block.size(), TILE_ROWS) + TILE_ROWS, group = head / x.shared();
    read_rows(keys, x.key_width(), rows, x.k, m.row, tokens, group, x.key_channels);
    read_rows(values, x.value_width(), rows, x.v, m.row, tokens, group, x.value_channels);
  }
};

// A block of queries on its way over the keys.
struct QueryBlock {
  Span queries;
  float *q, *o;       // transposed: [K, QUERIES] times scale / ln 2, [V, QUERIES]
  float *top, *total;  // [QUERIES] each

  static int64_t size(const Attention& x) { return QUERIES * (x.key_width() + x.value_width() + 2 * LANES); }
  void take(const Attention& x, Scratch& scratch) {
    q = scratch.take(x.key_width() * QUERIES);
    o = scratch.take(x.value_width() * QUERIES);
    top = scratch.take(QUERIES);
    total = scratch.take(QUERIES);
  }
  void begin(const Attention& x, const Meeting& m, int64_t head, Span its, float* rows) {
    queries = its;
    int64_t width = x.key_width();
    Span tokens = {m.start + its.begin, m.start + its.end};
    read_rows(rows, width, QUERIES, x.q, m.row, tokens, head, x.key_channels, float(x.scale * LOG2E));
    transpose(q, QUERIES, rows, width, QUERIES, width);
    std::fill(o, o + x.value_width() * QUERIES, 0.0f);
    std::fill(top, top + QUERIES, -INFINITE);
    std::fill(total, total + QUERIES, 0.0f);
  }

  // Takes up a piece of the keys; `weights` [KEYS, QUERIES] is room.
  void add(const Attention& x, const Piece& piece, const float* keys, const float* values, float* weights) {
    int64_t count = piece.keys.size(), rows = round_up(count, TILE_ROWS), columns = piece.lanes.size();
    alignas(64) float new_top[QUERIES], old_share[QUERIES];
    std::copy(top, top + QUERIES, new_top);
    for_tiles(rows, columns, [&]<int ROWS, int VECTORS>(int64_t i, int64_t column) {
      int64_t lane = piece.lanes.begin + column;
      Tile<ROWS, VECTORS> scores;
      scores.clear();
      scores.add_product({keys + i * x.key_width(), x.key_width(), 1}, q + lane, QUERIES, x.key_channels);
      if (!piece.whole) piece.hide(scores, i, lane, -INFINITE);
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
      add_seen<Weights::right>(mixed, piece.whole, {values + i, 1, x.value_width()}, weights + lane, QUERIES, count);
      mixed.store(o + i * QUERIES + lane, QUERIES);
    });
  }

  void finish(const Forward& f, const Meeting& m, int64_t head, float* rows) {
    const Attention& x = f.attention;
    int64_t width = x.value_width();
    for (int64_t lane = 0; lane < QUERIES; lane += LANES) {
      Vec sum = load(total + lane), share = sum == 0.0f ? zeros() : 1.0f / sum;
      for (int64_t c = 0; c < x.value_channels; c++) {
        float* place = o + c * QUERIES + lane;
        store(place, load(place) * share);
      }
      store(total + lane, sum == 0.0f ? broadcast(-INFINITE) : load(top + lane) * (1.0f / LOG2E) + log(sum));
    }
    transpose(rows, width, o, QUERIES, width, QUERIES);
    Span tokens = {m.start + queries.begin, m.start + queries.end};
    write_rows(f.o, m.row, tokens, head, x.value_channels, rows, width);
    for (int64_t i = 0; i < queries.size(); i++) *f.lse.at<float>(m.row, tokens.begin + i, head) = total[i];
  }
};

void forward(const Forward& f, const Unit& unit, Scratch scratch) {
  const Attention& x = f.attention;
  Meeting m = x.meeting(unit.n);
  KeyBlock block(x, scratch);
  float* weights = scratch.take(KEYS * QUERIES);
  float* rows = scratch.take(QUERIES * std::max(x.key_width(), x.value_width()));
  QueryBlock blocks[BLOCKS];
  int64_t count = 0;
  for (int64_t i = unit.queries.begin; i < unit.queries.end; i += QUERIES) {
    blocks[count].take(x, scratch);
    blocks[count++].begin(x, m, unit.head, {i, std::min(i + QUERIES, unit.queries.end)}, rows);
  }
  Span reach = x.reach(m, unit.queries);
  for (int64_t j = reach.begin / KEYS * KEYS; j < reach.end; j += KEYS) {
    Span keys = common({j, j + KEYS}, reach);
    block.read(x, m, unit.head, keys);
    for (int64_t b = 0; b < count; b++) {
      Piece piece(x, m, unit.head, blocks[b].queries.begin);
      for_pieces(x, m, piece, blocks[b].queries, keys, [&] {
        int64_t first = piece.keys.begin - keys.begin;
        blocks[b].add(x, piece, block.keys + first * x.key_width(), block.values + first * x.value_width(), weights);
      });
    }
  }
  for (int64_t b = 0; b < count; b++) blocks[b].finish(f, m, unit.head, rows);
}

// A block of queries and what the backward pass knows of them.
struct GradientBlock {
  Span queries;
  float *q, *g, *q_turned, *g_turned, *d_q;  // q times scale, g; q^T times scale / ln 2, g^T, dq^T: [channels, QUERIES]
  float *lse, *delta;                        // [QUERIES]; lse / ln 2

  static int64_t size(const Attention& x) { return QUERIES * (3 * x.key_width() + 2 * x.value_width() + 2 * LANES); }
  void take(const Attention& x, Scratch& scratch) {
    for (float** piece : {&q, &q_turned, &d_q}) *piece = scratch.take(x.key_width() * QUERIES);
    for (float** piece : {&g, &g_turned}) *piece = scratch.take(x.value_width() * QUERIES);
    lse = scratch.take(QUERIES);
    delta = scratch.take(QUERIES);
  }
  void begin(const Backward& b, const Meeting& m, int64_t head, Span its, float* rows) {
    const Attention& x = b.attention;
    queries = its;
    Span tokens = {m.start + its.begin, m.start + its.end};
    int64_t width = x.key_width();
    read_rows(q, width, QUERIES, x.q, m.row, tokens, head, x.key_channels, float(x.scale * LOG2E));
    transpose(q_turned, QUERIES, q, width, QUERIES, width);
    read_rows(q, width, QUERIES, x.q, m.row, tokens, head, x.key_channels, float(x.scale));
    std::fill(d_q, d_q + width * QUERIES, 0.0f);

    width = x.value_width();
    read_rows(g, width, QUERIES, b.d_o, m.row, tokens, head, x.value_channels);
    transpose(g_turned, QUERIES, g, width, QUERIES, width);
    read_rows(rows, width, QUERIES, b.o, m.row, tokens, head, x.value_channels);
    for (int64_t i = 0; i < QUERIES; i++) {
      bool there = i < its.size();
      float of_lse = there ? *b.lse.at<float>(m.row, tokens.begin + i, head) : 0.0f;
      lse[i] = of_lse == -INFINITE ? 0.0f : of_lse * LOG2E;
      Vec sum = zeros();
      for (int64_t c = 0; c < width; c += LANES) sum += load(rows + i * width + c) * load(g + i * width + c);
      delta[i] = ::sum(sum);
      if (there && b.d_lse) delta[i] -= *b.d_lse.at<float>(m.row, tokens.begin + i, head);
    }
  }

  // The piece's weights and the gradients of its scores, both [KEYS, QUERIES].
  void weigh(const Attention& x, const Piece& piece, const float* keys, const float* values, float* weights,
             float* d_scores) const {
    int64_t rows = round_up(piece.keys.size(), TILE_ROWS);
    for_tiles(rows, piece.lanes.size(), [&]<int ROWS, int VECTORS>(int64_t i, int64_t column) {
      int64_t lane = piece.lanes.begin + column;
      Tile<ROWS, VECTORS> weight, d_score;
      weight.clear();
      weight.add_product({keys + i * x.key_width(), x.key_width(), 1}, q_turned + lane, QUERIES, x.key_channels);
      for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) weight.at[r][c] = exp2(weight.at[r][c] - load(lse + lane + c * LANES));
      if (!piece.whole) piece.hide(weight, i, lane, 0.0f);
      weight.store(weights + i * QUERIES + lane, QUERIES);

      d_score.clear();
      d_score.add_product({values + i * x.value_width(), x.value_width(), 1}, g_turned + lane, QUERIES, x.value_channels);
      for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) {
          Vec weight = load(weights + (i + r) * QUERIES + lane + c * LANES);
          d_score.at[r][c] = (d_score.at[r][c] - load(delta + lane + c * LANES)) * weight;
        }
      if (!piece.whole) piece.hide(d_score, i, lane, 0.0f);
      d_score.store(d_scores + i * QUERIES + lane, QUERIES);
    });
  }

  void finish(const Backward& b, const Meeting& m, int64_t head) {
    const Attention& x = b.attention;
    for (int64_t i = 0; i < x.key_width() * QUERIES; i += LANES) store(d_q + i, load(d_q + i) * float(x.scale));
    transpose(q, x.key_width(), d_q, QUERIES, x.key_width(), QUERIES);
    Span tokens = {m.start + queries.begin, m.start + queries.end};
    write_rows(b.d_q, m.row, tokens, head, x.key_channels, q, x.key_width());
  }
};

// A block of keys' gradients, summed over the queries of a unit.
struct KeyGradients {
  float *d_keys, *d_values;

  static int64_t size(const Attention& x) { return KEY_ROWS * (x.key_width() + x.value_width()); }
  KeyGradients(const Attention& x, Scratch& scratch)
      : d_keys(scratch.take(KEY_ROWS * x.key_width())), d_values(scratch.take(KEY_ROWS * x.value_width())) {}
  void clear(const Attention& x) {
    std::fill(d_keys, d_keys + KEY_ROWS * x.key_width(), 0.0f);
    std::fill(d_values, d_values + KEY_ROWS * x.value_width(), 0.0f);
  }
  static void add(const Tensor& to, const float* from, int64_t width, int64_t channels, int64_t row, Span tokens,
                  int64_t group) {
    for (int64_t i = 0; i < tokens.size(); i++) {
      float* place = to.at<float>(row, tokens.begin + i, group);
      for (int64_t c = 0; c < channels; c += LANES)
        store_some(place + c, load_some(place + c, channels - c) + load(from + i * width + c), channels - c);
    }
  }
};

// The products of a piece with its weights: to[rows of keys, width] += weights[rows, queries] x[queries, width].
void add_to_keys(float* to, int64_t width, const Piece& piece, const float* weights, const float* x, int64_t queries) {
  int64_t first = piece.lanes.begin, depth = std::min(piece.lanes.end, queries) - first;
  for_tiles(round_up(piece.keys.size(), TILE_ROWS), width, [&]<int ROWS, int VECTORS>(int64_t i, int64_t j) {
    Tile<ROWS, VECTORS> tile;
    tile.load(to + i * width + j, width);
    Matrix part = {weights + i * QUERIES + first, QUERIES, 1};
    add_seen<Weights::left>(tile, piece.whole, part, x + first * width + j, width, depth);
    tile.store(to + i * width + j, width);
  });
}

// dq^T[channels, queries] += K^T[channels, keys] dS^T[keys, queries]
void add_to_queries(float* d_q, int64_t channels, int64_t width, const Piece& piece, const float* keys,
                    const float* d_scores) {
  int64_t rows = round_up(channels, TILE_ROWS);
  for_tiles(rows, piece.lanes.size(), [&]<int ROWS, int VECTORS>(int64_t i, int64_t column) {
    int64_t lane = piece.lanes.begin + column;
    Tile<ROWS, VECTORS> tile;
    tile.load(d_q + i * QUERIES + lane, QUERIES);
    add_seen<Weights::right>(tile, piece.whole, {keys + i, 1, width}, d_scores + lane, QUERIES, piece.keys.size());
    tile.store(d_q + i * QUERIES + lane, QUERIES);
  });
}

// How far a unit has come with adding to the gradients of keys: all from this place on are done. A unit adds to a key
// after the unit before it, so sums have one order whatever the threads. All go from the last key to the first: under a
// causal rule a later unit begins with keys that the one before it does not see, and follows it without waiting.
using Progress = std::atomic<int64_t>;

void backward(const Backward& b, const Unit& unit, const Progress* before, Progress& done, Scratch scratch) {
  const Attention& x = b.attention;
  Meeting m = x.meeting(unit.n);
  KeyBlock block(x, scratch);
  KeyGradients sums(x, scratch);
  float* weights = scratch.take(KEYS * QUERIES);
  float* d_scores = scratch.take(KEYS * QUERIES);
  float* rows = scratch.take(QUERIES * x.value_width());
  GradientBlock blocks[BLOCKS];
  int64_t count = 0, group = unit.head / x.shared();
  for (int64_t i = unit.queries.begin; i < unit.queries.end; i += QUERIES) {
    blocks[count].take(x, scratch);
    blocks[count++].begin(b, m, unit.head, {i, std::min(i + QUERIES, unit.queries.end)}, rows);
  }
  Span reach = x.reach(m, unit.queries);
  for (int64_t j = (reach.end - 1) / KEYS * KEYS; !reach.empty() && j + KEYS > reach.begin; j -= KEYS) {
    Span keys = common({j, j + KEYS}, reach);
    block.read(x, m, unit.head, keys);
    sums.clear(x);
    for (int64_t i = 0; i < count; i++) {
      GradientBlock& its = blocks[i];
      Piece piece(x, m, unit.head, its.queries.begin);
      for_pieces(x, m, piece, its.queries, keys, [&] {
        int64_t first = piece.keys.begin - keys.begin, key_place = first * x.key_width(), place = first * x.value_width();
        its.weigh(x, piece, block.keys + key_place, block.values + place, weights, d_scores);
        add_to_keys(sums.d_values + place, x.value_width(), piece, weights, its.g, its.queries.size());
        add_to_keys(sums.d_keys + key_place, x.key_width(), piece, d_scores, its.q, its.queries.size());
        add_to_queries(its.d_q, x.key_channels, x.key_width(), piece, block.keys + key_place, d_scores);
      });
    }
    while (before && before->load(std::memory_order_acquire) > j) std::this_thread::yield();
    Span tokens = {m.start + keys.begin, m.start + keys.end};
    KeyGradients::add(b.d_k, sums.d_keys, x.key_width(), x.key_channels, m.row, tokens, group);
    KeyGradients::add(b.d_v, sums.d_values, x.value_width(), x.value_channels, m.row, tokens, group);
    done.store(j, std::memory_order_release);
  }
  for (int64_t i = 0; i < count; i++) blocks[i].finish(b, m, unit.head);
}

int64_t bytes(std::initializer_list<int64_t> numbers) {
  int64_t all = 0;
  for (int64_t count : numbers) all += count * int64_t(sizeof(float)) + 64 * 16;
  return all;
}

}  // namespace

KERNEL(softmax_attention_forward, Forward) {
  const Attention& x = arguments.attention;
  std::vector<Unit> units = units_of(x, PANEL);
  int64_t rows = QUERIES * std::max(x.key_width(), x.value_width());
  int64_t room = bytes({KeyBlock::size(x), KEYS * QUERIES, rows, BLOCKS * QueryBlock::size(x)});
  parallel_queue(int64_t(units.size()), [&](auto next) {
    Scratch scratch(room);
    for (int64_t i = next(); i < int64_t(units.size()); i = next()) forward(arguments, units[i], scratch);
  });
}

KERNEL(softmax_attention_backward, Backward) {
  const Attention& x = arguments.attention;
  std::vector<Unit> units = units_of(x, PANEL);
  std::vector<Progress> progress(units.size());
  for (size_t i = 0; i < units.size(); i++)
    progress[i] = round_up(std::max<int64_t>(x.reach(x.meeting(units[i].n), units[i].queries).end, 0), KEYS);
  int64_t room = bytes({KeyBlock::size(x), KeyGradients::size(x), 2 * KEYS * QUERIES, QUERIES * x.value_width(),
                        BLOCKS * GradientBlock::size(x)});
  parallel_queue(int64_t(units.size()), [&](auto next) {
    Scratch scratch(room);
    for (int64_t i = next(); i < int64_t(units.size()); i = next())
      backward(arguments, units[i], units[i].first ? nullptr : &progress[i - 1], progress[i], scratch);
  });
}

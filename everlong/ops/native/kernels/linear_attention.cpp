// Linear attention: the forward pass in blocks, and token by token where there are few.
#include "linear_attention.h"

namespace {

constexpr int FEW = 4;  // tokens that are taken one by one, the state read and written once for all of them

struct Forward {
  Inputs in;
  Tensor state, total;          // [N, H, K, V] and [N, H, K], or none
  Tensor o, last, last_total;   // [B, T, H, V], and the states after the last token
  Tensor denominator;           // [B, T, H]: q^T z, with `normalize`; or none
  Tensor starts, starts_total;  // [slots, H, K, V] and [slots, H, K]: the states before groups of tokens; or none
};

// o = reading S + weights v; weights past the diagonal are not touched: what they would weigh may be infinite.
void read_state(float* o, const Block& b, const float* state) {
  for_tiles(round_up(b.count, TILE_ROWS), b.values, [&]<int ROWS, int WIDTH>(int64_t i, int64_t j) {
    Tile<ROWS, WIDTH> tile;
    tile.clear();
    tile.add_product({b.reading + i * b.keys, b.keys, 1}, state + j, b.values, b.keys);
    add_triangle(tile, {b.weights + i * BLOCK, BLOCK, 1}, b.v + j, b.values, i);
    tile.store(o + i * b.values + j, b.values);
  });
}

// S <- total S + writing^T v; the block's part is summed first, lest each small addition to a large state be rounded.
void move_state(float* state, const Block& b, Ahead ahead) {
  for_tiles(b.keys, b.values, [&]<int ROWS, int WIDTH>(int64_t d, int64_t j) {
    ahead.next_row();
    Tile<ROWS, WIDTH> tile;
    tile.clear();
    tile.add_product({b.writing + d, 1, b.keys}, b.v + j, b.values, BLOCK);
    float* at = state + d * b.values + j;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
      for (int n = 0; n < WIDTH; n++) {
        Vec before = load(at + i * b.values + n * LANES);
        store(at + i * b.values + n * LANES,
              grown(before, tile.at[i][n], broadcast(b.keep[d + i]), broadcast(b.change[d + i])));
      }
  });
}

// Divides by the column after the last, which goes to the denominators; 0 where that is 0.
void normalize(float* o, const Block& b, const Forward& x, const Sequence& s, const Team& team, int64_t head,
               int64_t t) {
  for (int64_t i = 0; i < b.count; i++) {
    float* row = o + i * b.values;
    float by = row[team.columns], inverse = by == 0 ? 0 : 1 / by;
    for (int64_t j = 0; j < b.values; j += LANES) store(row + j, by == 0 ? zeros() : load(row + j) * inverse);
    if (x.denominator && team.first == 0) *x.denominator.at<float>(s.row, t + i, head) = by;
  }
}

void in_blocks(const Forward& x, const Team& team, const Sequence& s) {
  const Inputs& in = x.in;
  int64_t keys = round_up(in.keys, BLOCK), values = round_up(team.columns + in.normalize, BLOCK);
  Scratch scratch(Block::bytes(keys, values) + 4 * (BLOCK + team.heads * keys) * values);
  Block block(in, team.columns, scratch);
  float *o = scratch.take(BLOCK * values), *states = scratch.take(team.heads * keys * values);
  for (int64_t h = 0; h < team.heads; h++)
    load_state(states + h * keys * values, block, x.state, x.total, team, team.n, team.head + h);
  for (int64_t start = s.start; start < s.stop; start += VISIT)
    for (int64_t h = 0; h < team.heads; h++) {
      int64_t head = team.head + h;
      float* state = states + h * keys * values;
      if (x.starts && (start - s.start) % GROUP == 0)
        store_state(x.starts, x.starts_total, state, block, team, in.slot(team.n, s, start), head);
      block.use_head(head);
      for (int64_t t = start; t < std::min(s.stop, start + VISIT); t += BLOCK) {
        block.load_written(s, team, head, t);
        block.load_reading(s, head, t);
        block.weigh();
        read_state(o, block, state);
        bool turn = t + BLOCK >= std::min(s.stop, start + VISIT), last = h + 1 == team.heads;
        int64_t next = turn ? head + (last ? 1 - team.heads : 1) : head;
        int64_t token = turn ? (last ? start + VISIT : start) : t + BLOCK;
        Ahead ahead(std::min<int64_t>(BLOCK, s.stop - token));
        block.ask_written(ahead, s, team, next, token);
        ahead.add(in.q, s.row, token, in.key_head(next), 0, in.keys);
        move_state(state, block, ahead);
        if (in.normalize) normalize(o, block, x, s, team, head, t);
        store_rows(x.o, x.o.offset(s.row, t, head, team.first), o, values, block.count, team.columns, in.large());
      }
    }
  for (int64_t h = 0; h < team.heads; h++)
    store_state(x.last, x.last_total, states + h * keys * values, block, team, team.n, team.head + h);
}

// Up to FEW tokens of one head in float32.
struct Steps {
  int64_t channels, keys, values;  // as given; rounded up
  float *q, *k, *a, *v;            // [tokens, keys] thrice and [tokens, values]; a is e^g
  float own[FEW];                  // q^T diag(u) k, with a bonus
  float* o;                        // [tokens, values]
};

// Columns of one head's state (`left` of them from the first, where they are no WHOLE vectors) on their way through the
// registers. EARLY, with a bonus, reads the state before the token's own decay and pair.
template <int COUNT, int WIDTH, bool EARLY, bool WHOLE>
void step(const Steps& x, const float* from, int64_t from_row, float* to, int64_t to_row, int64_t first, int64_t left) {
  const float *q = x.q, *k = x.k, *a = x.a;
  int64_t channels = x.channels, keys = x.keys, values = x.values;
  Vec value[COUNT][WIDTH], sum[COUNT][WIDTH];
#pragma GCC unroll 4
  for (int t = 0; t < COUNT; t++)
#pragma GCC unroll 4
    for (int j = 0; j < WIDTH; j++) {
      value[t][j] = load(x.v + t * values + first + j * LANES);
      sum[t][j] = EARLY ? value[t][j] * x.own[t] : zeros();
    }
  for (int64_t d = 0; d < channels; d++)
#pragma GCC unroll 4
    for (int j = 0; j < WIDTH; j++) {
      const float* here = from + d * from_row + j * LANES;
      Vec s = WHOLE ? load(here) : load_some(here, left);
#pragma GCC unroll 4
      for (int t = 0; t < COUNT; t++) {
        if (EARLY) sum[t][j] += s * q[t * keys + d];
        s = s * a[t * keys + d] + value[t][j] * k[t * keys + d];
        if (!EARLY) sum[t][j] += s * q[t * keys + d];
      }
      float* there = to + d * to_row + j * LANES;
      WHOLE ? store(there, s) : store_some(there, s, left);
    }
#pragma GCC unroll 4
  for (int t = 0; t < COUNT; t++)
#pragma GCC unroll 4
    for (int j = 0; j < WIDTH; j++) store(x.o + t * values + first + j * LANES, sum[t][j]);
}

// All columns of a team; `zero` is what there is without a first state.
template <int COUNT, bool EARLY>
void step_state(const Steps& x, const Forward& forward, const Team& team, int64_t head, const float* zero) {
  constexpr int WIDTH = COUNT > 2 ? 2 : 4;
  const Tensor &state = forward.state, &last = forward.last;
  int64_t row = state ? state.stride[2] : 0, j = 0;
  const float* from = state ? state.at<float>(team.n, head, 0, team.first) : zero;
  float* to = last.at<float>(team.n, head, 0, team.first);
  for (; j + WIDTH * LANES <= team.columns; j += WIDTH * LANES)
    step<COUNT, WIDTH, EARLY, true>(x, from + (row ? j : 0), row, to + j, last.stride[2], j, 0);
  for (; j + LANES <= team.columns; j += LANES)
    step<COUNT, 1, EARLY, true>(x, from + (row ? j : 0), row, to + j, last.stride[2], j, 0);
  if (j < team.columns)
    step<COUNT, 1, EARLY, false>(x, from + (row ? j : 0), row, to + j, last.stride[2], j, team.columns - j);
}

// o of up to FEW tokens divided by q^T z, and z after them.
void step_total(const Steps& x, const Forward& forward, const Team& team, const Sequence& s, int64_t head, float* z) {
  const Inputs& in = forward.in;
  std::fill(z, z + x.keys, 0.0f);
  if (forward.total) read(z, forward.total, forward.total.offset(team.n, head), in.keys, forward.total.stride[2]);
  for (int64_t t = 0; t < s.stop - s.start; t++) {
    float by = in.bonus ? x.own[t] : 0;
    for (int64_t d = 0; d < in.keys; d++) {
      float before = z[d];
      z[d] = before * x.a[t * x.keys + d] + x.k[t * x.keys + d];
      by += (in.bonus ? before : z[d]) * x.q[t * x.keys + d];
    }
    float inverse = by == 0 ? 0 : 1 / by, *o = x.o + t * x.values;
    for (int64_t j = 0; j < x.values; j += LANES) store(o + j, by == 0 ? zeros() : load(o + j) * inverse);
    if (forward.denominator && team.first == 0) *forward.denominator.at<float>(s.row, s.start + t, head) = by;
  }
  if (team.first == 0) write(forward.last_total, forward.last_total.offset(team.n, head), z, in.keys, 1);
}

void in_steps(const Forward& x, const Team& team, const Sequence& s) {
  const Inputs& in = x.in;
  int64_t count = s.stop - s.start, t = s.start;
  int64_t keys = round_up(in.keys, LANES), values = round_up(team.columns, LANES);
  constexpr int64_t WIDEST = 4 * LANES;
  Scratch scratch(4 * (FEW * (3 * keys + 2 * values) + 2 * keys + WIDEST) + 1024);
  Steps steps{in.keys, keys, values, {}, {}, {}, {}, {}, {}};
  for (float** rows : {&steps.q, &steps.k, &steps.a}) *rows = scratch.take(count * keys);
  for (float** rows : {&steps.v, &steps.o}) *rows = scratch.take(count * values);
  float *bonus = scratch.take(keys), *z = scratch.take(keys), *zero = scratch.take(WIDEST);
  std::fill(bonus, bonus + keys, 0.0f);
  std::fill(zero, zero + WIDEST, 0.0f);
  for (int64_t head = team.head; head < team.head + team.heads; head++) {
    int64_t shared = in.key_head(head);
    load_rows(steps.q, keys, in.q, in.q.offset(s.row, t, shared), count, in.keys, float(in.scale), count);
    load_rows(steps.k, keys, in.k, in.k.offset(s.row, t, shared), count, in.keys, 1, count);
    load_rows(steps.v, values, in.v, in.v.offset(s.row, t, head, team.first), count, team.columns, 1, count);
    std::fill(steps.a, steps.a + count * keys, 0.0f);
    if (in.decay == Decay::channel)
      load_rows(steps.a, keys, in.log_decay, in.log_decay.offset(s.row, t, head), count, in.keys, 1, count);
    for (int64_t i = 0; in.decay == Decay::token && i < count; i++) {
      float g;
      read(&g, in.log_decay, in.log_decay.offset(s.row, t + i, head), 1, 1);
      std::fill(steps.a + i * keys, steps.a + (i + 1) * keys, g);
    }
    for (int64_t i = 0; i < count * keys; i += LANES) store(steps.a + i, exp(load(steps.a + i)));
    if (in.bonus) read(bonus, in.bonus, in.bonus.offset(head), in.keys, 1);
    for (int64_t i = 0; in.bonus && i < count; i++)
      steps.own[i] = dot(steps.q + i * keys, bonus, steps.k + i * keys, keys);
    constexpr decltype(&step_state<1, false>) ways[2][FEW] = {
        {step_state<1, false>, step_state<2, false>, step_state<3, false>, step_state<4, false>},
        {step_state<1, true>, step_state<2, true>, step_state<3, true>, step_state<4, true>}};
    ways[bool(in.bonus)][count - 1](steps, x, team, head, zero);
    if (in.normalize) step_total(steps, x, team, s, head, z);
    store_rows(x.o, x.o.offset(s.row, t, head, team.first), steps.o, values, count, team.columns, false);
  }
}

// Saves the state before the first tokens as it came.
void save_first(const Forward& x, const Team& team, const Sequence& s) {
  for (int64_t head = team.head; head < team.head + team.heads; head++) {
    int64_t slot = x.in.slot(team.n, s, s.start);
    for (int64_t d = 0; d < x.in.keys; d++) {
      float* row = x.starts.at<float>(slot, head, d, team.first);
      std::fill(row, row + team.columns, 0.0f);
      if (x.state) read(row, x.state, x.state.offset(team.n, head, d, team.first), team.columns, 1);
      if (x.in.normalize) *x.starts_total.at<float>(slot, head, d) = x.total ? *x.total.at<float>(team.n, head, d) : 0;
    }
  }
}

}  // namespace

KERNEL(linear_attention_forward, Forward) {
  for_teams(arguments.in, [&](const Team& team) {
    Sequence s = arguments.in.sequence(team.n);
    int64_t count = s.stop - s.start;
    if (count == 0 || count > FEW) return in_blocks(arguments, team, s);
    if (arguments.starts) save_first(arguments, team, s);
    in_steps(arguments, team, s);
  });
}

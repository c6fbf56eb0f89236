// Linear attention: the forward pass in blocks, and token by token where there are few.
#include "linear_attention.h"

namespace {

constexpr int FEW = 4;  // tokens that are taken one by one, the state read and written once for all of them

struct Forward {
  Inputs in;
  Tensor state, total;            // [N, H, K, V] and [N, H, K], or none
  Tensor o, last, last_total;     // [B, T, H, V], and the states after the last token
  Tensor denominator;             // [B, T, H]: q^T z, with `normalize`
  Tensor starts, starts_total;    // [slots, H, K, V] and [slots, H, K]: the states before groups of tokens; none
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

// S <- total S + writing^T v; the block's own part is summed first, lest each small addition to a large state be rounded
void move_state(float* state, const Block& b) {
  for_tiles(b.keys, b.values, [&]<int ROWS, int WIDTH>(int64_t d, int64_t j) {
    Tile<ROWS, WIDTH> tile;
    tile.clear();
    tile.add_product({b.writing + d, 1, b.keys}, b.v + j, b.values, BLOCK);
    float* at = state + d * b.values + j;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
      for (int n = 0; n < WIDTH; n++) {
        Vec before = load(at + i * b.values + n * LANES);
        store(at + i * b.values + n * LANES, grown(before, tile.at[i][n], broadcast(b.keep[d + i]), broadcast(b.change[d + i])));
      }
  });
}

// Divides by the column after the last, which goes to the denominators; 0 where that is 0.
void normalize(float* o, const Block& b, const Forward& x, const Sequence& s, const Team& team, int64_t head, int64_t t) {
  for (int64_t i = 0; i < b.count; i++) {
    float* row = o + i * b.values;
    float by = row[team.columns], inverse = by == 0 ? 0 : 1 / by;
    for (int64_t j = 0; j < b.values; j += LANES) store(row + j, by == 0 ? zeros() : load(row + j) * inverse);
    if (team.first == 0) *x.denominator.at<float>(s.row, t + i, head) = by;
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
        move_state(state, block);
        if (in.normalize) normalize(o, block, x, s, team, head, t);
        store_rows(x.o, x.o.offset(s.row, t, head, team.first), o, values, block.count, team.columns);
      }
    }
  for (int64_t h = 0; h < team.heads; h++)
    store_state(x.last, x.last_total, states + h * keys * values, block, team, team.n, team.head + h);
}

// Up to FEW tokens of one head in float32.
struct Steps {
  bool early;            // the state is read before the token's own decay and pair, which counts by the bonus
  int64_t keys, values;  // rounded up
  float *q, *k, *a, *v;  // [tokens, keys] thrice and [tokens, values]; a is e^g
  float own[FEW];        // q^T diag(u) k
  float* o;              // [tokens, values]
};

// Some columns of one head's state, from `state` to `last` on their way through the registers.
template <int COUNT, int WIDTH>
INLINE void step(const Steps& x, const float* state, int64_t state_row, float* last, int64_t last_row, int64_t keys,
                 int64_t first, int64_t columns) {
  Vec value[COUNT][WIDTH], sum[COUNT][WIDTH];
#pragma GCC unroll 4
  for (int t = 0; t < COUNT; t++)
#pragma GCC unroll 4
    for (int j = 0; j < WIDTH; j++) {
      value[t][j] = load(x.v + t * x.values + first + j * LANES);
      sum[t][j] = x.early ? value[t][j] * x.own[t] : zeros();
    }
  for (int64_t d = 0; d < keys; d++)
#pragma GCC unroll 4
    for (int j = 0; j < WIDTH; j++) {
      int64_t at = first + j * LANES, left = columns - at;
      Vec s = state ? load_some(state + d * state_row + at, left) : zeros();
#pragma GCC unroll 4
      for (int t = 0; t < COUNT; t++) {
        Vec before = s;
        s = s * x.a[t * x.keys + d] + value[t][j] * x.k[t * x.keys + d];
        sum[t][j] += (x.early ? before : s) * x.q[t * x.keys + d];
      }
      store_some(last + d * last_row + at, s, left);
    }
#pragma GCC unroll 4
  for (int t = 0; t < COUNT; t++)
#pragma GCC unroll 4
    for (int j = 0; j < WIDTH; j++) store(x.o + t * x.values + first + j * LANES, sum[t][j]);
}

template <int COUNT>
void step_state(const Steps& x, const Forward& forward, const Team& team, int64_t head) {
  const Tensor& state = forward.state;
  const float* from = state ? state.at<float>(team.n, head, 0, team.first) : nullptr;
  float* to = forward.last.at<float>(team.n, head, 0, team.first);
  int64_t row = state.stride[2], last_row = forward.last.stride[2], keys = forward.in.keys, j = 0;
  for (; j + 4 * LANES <= team.columns; j += 4 * LANES)
    step<COUNT, 4>(x, from, row, to, last_row, keys, j, team.columns);
  for (; j < team.columns; j += LANES) step<COUNT, 1>(x, from, row, to, last_row, keys, j, team.columns);
}

// o of up to FEW tokens divided by q^T z, and z after them.
void step_total(const Steps& x, const Forward& forward, const Team& team, const Sequence& s, int64_t head, float* z) {
  const Inputs& in = forward.in;
  if (forward.total) read(z, forward.total, forward.total.offset(team.n, head), in.keys, 1);
  for (int64_t t = 0; t < s.stop - s.start; t++) {
    float by = x.early ? x.own[t] : 0;
    for (int64_t d = 0; d < in.keys; d++) {
      float before = z[d];
      z[d] = before * x.a[t * x.keys + d] + x.k[t * x.keys + d];
      by += (x.early ? before : z[d]) * x.q[t * x.keys + d];
    }
    float inverse = by == 0 ? 0 : 1 / by, *o = x.o + t * x.values;
    for (int64_t j = 0; j < x.values; j += LANES) store(o + j, by == 0 ? zeros() : load(o + j) * inverse);
    if (team.first == 0) *forward.denominator.at<float>(s.row, s.start + t, head) = by;
  }
  if (team.first == 0) write(forward.last_total, forward.last_total.offset(team.n, head), z, in.keys, 1);
}

void in_steps(const Forward& x, const Team& team, const Sequence& s) {
  const Inputs& in = x.in;
  int64_t count = s.stop - s.start, t = s.start, keys = round_up(in.keys, LANES), values = round_up(team.columns, LANES);
  Scratch scratch(4 * (FEW * (3 * keys + 2 * values) + 2 * keys) + 1024);
  Steps steps{bool(in.bonus), keys, values, {}, {}, {}, {}, {}, {}};
  for (float** rows : {&steps.q, &steps.k, &steps.a}) *rows = scratch.take(count * keys);
  for (float** rows : {&steps.v, &steps.o}) *rows = scratch.take(count * values);
  float *bonus = scratch.take(keys), *z = scratch.take(keys);
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
    std::fill(bonus, bonus + keys, 0.0f);
    std::fill(z, z + keys, 0.0f);
    if (in.bonus) read(bonus, in.bonus, in.bonus.offset(head), in.keys, 1);
    for (int64_t i = 0; i < count; i++) steps.own[i] = dot(steps.q + i * keys, bonus, steps.k + i * keys, keys);
    constexpr decltype(&step_state<1>) by_count[FEW] = {step_state<1>, step_state<2>, step_state<3>, step_state<4>};
    by_count[count - 1](steps, x, team, head);
    if (in.normalize) step_total(steps, x, team, s, head, z);
    store_rows(x.o, x.o.offset(s.row, t, head, team.first), steps.o, values, count, team.columns);
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

// Linear attention: the backward pass, block by block from the end.
//
// States and their gradients are held across, [values, keys]. Of a block, with S before it and dS after it:
//
//     d_reading_i = S d_o_i                        d_writing_j = dS v_j
//     d_weights_ij = d_o_i^T v_j                   d_v_j = dS^T writing_j + sum_{i>=j} weights_ij d_o_i
//     d_total = S dS                               dS <- total dS + sum_i reading_i d_o_i^T
//
// The gradient of a log-decay g_s is the sum of all products that e^{g_s} is a factor of: added up as they stand, since
// the shorter q d_q - k d_k loses the digits of strong decays. States are computed again from those saved by the
// forward pass, a group of tokens at a time.
#include "linear_attention.h"

namespace {

struct Backward {
  Inputs in;
  Tensor o, denominator;             // with `normalize`
  Tensor starts, starts_total;       // [slots, H, K, V] and [slots, H, K]
  Tensor d_o, d_last, d_last_total;  // the last two may be none
  Tensor d_q, d_k, d_v;              // for each head of v: [B, T, H, K] twice, [B, T, H, V]
  Tensor d_log_decay;                // as log_decay; or [slots, H], to be summed, where it is a head's
  Tensor d_bonus;                    // [slots, H, K], to be summed
  Tensor d_state, d_total;           // of the initial states
  Tensor ends;                       // [slots, H, values, K]: room for gradients of states after groups, or none
  int64_t decay_of_head;
};

// What the gradients of a block are made of and written to.
struct Gradients {
  const Backward& x;
  Block& b;
  float *d_o, *v_across, *writing_across;  // [BLOCK, values], [values, BLOCK], [keys, BLOCK]
  float *d_weights, *d_products;           // [BLOCK, BLOCK]: of the weights; of q^T k, with decays of channels as asked
  float *d_q, *d_k, *d_v, *d_v_across;     // [BLOCK, keys] twice, [BLOCK, values], [values, BLOCK]
  float* d_factor;                         // [BLOCK] or [BLOCK, keys]: of log_decay
  float* d_bonus;                          // [keys]
  float* d_decay_of_head;                  // [1]
  float *whole_o, *whole_d_o;              // [BLOCK, V rounded up]

  static int64_t bytes(int64_t keys, int64_t values) {
    return 4 * (BLOCK * (5 * keys + 6 * values + 3 * BLOCK) + keys) + 1024;
  }

  Gradients(const Backward& backward, Block& block, Scratch& scratch) : x(backward), b(block) {
    for (float** rows : {&writing_across, &d_q, &d_k, &d_factor}) *rows = scratch.take(BLOCK * b.keys);
    for (float** rows : {&d_o, &v_across, &d_v, &d_v_across}) *rows = scratch.take(BLOCK * b.values);
    for (float** rows : {&whole_o, &whole_d_o}) *rows = scratch.take(BLOCK * round_up(x.in.values, LANES));
    for (float** rows : {&d_weights, &d_products}) *rows = scratch.take(BLOCK * BLOCK);
    d_bonus = scratch.take(b.keys);
    d_decay_of_head = scratch.take(1);
  }

  void ask_read(Ahead& ahead, const Sequence& s, int64_t head, int64_t t) const {
    ahead.add(x.in.q, s.row, t, x.in.key_head(head), 0, x.in.keys);
    ahead.add(x.d_o, s.row, t, head, 0, x.in.values);
  }

  // The gradient of the output before it was divided, that of the divisor in the column after the last.
  void load_gradient(const Sequence& s, const Team& team, int64_t head, int64_t t) const {
    load_rows(d_o, b.values, x.d_o, x.d_o.offset(s.row, t, head, team.first), b.count, team.columns);
    if (!x.in.normalize) return;
    int64_t width = round_up(x.in.values, LANES);
    load_rows(whole_o, width, x.o, x.o.offset(s.row, t, head), b.count, x.in.values);
    load_rows(whole_d_o, width, x.d_o, x.d_o.offset(s.row, t, head), b.count, x.in.values);
    for (int64_t i = 0; i < b.count; i++) {
      float by = *x.denominator.at<float>(s.row, t + i, head), inverse = by == 0 ? 0 : 1 / by;
      Vec both = zeros();
      for (int64_t j = i * width; j < (i + 1) * width; j += LANES) both += load(whole_o + j) * load(whole_d_o + j);
      float* row = d_o + i * b.values;
      row[team.columns] = -sum(both);
      for (int64_t j = 0; j < b.values; j += LANES) store(row + j, by == 0 ? zeros() : load(row + j) * inverse);
    }
  }
};

// to = total from + left right: [values, keys], rows of `right` are tokens.
INLINE void grow(float* to, const float* from, const Block& b, const float* left, const float* right, Ahead ahead) {
  for_tiles(b.values, b.keys, [&]<int ROWS, int WIDTH>(int64_t j, int64_t d) {
    ahead.next_row();
    Tile<ROWS, WIDTH> tile;
    tile.clear();
    tile.add_product({left + j, 1, b.values}, right + d, b.keys, BLOCK);
#pragma GCC unroll 16
    for (int n = 0; n < WIDTH; n++) {
      Vec keep = load(b.keep + d + n * LANES), change = load(b.change + d + n * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        int64_t at = (j + i) * b.keys + d + n * LANES;
        store(to + at, grown(load(from + at), tile.at[i][n], keep, change));
      }
    }
  });
}

// Between the operator's layout, [keys, values], and the one here. `room` is as large as a state.
void load_across(float* to, float* room, const Block& b, const Tensor& state, const Tensor& total, const Team& team,
                 int64_t n, int64_t head) {
  load_state(room, b, state, total, team, n, head);
  transpose(to, b.keys, room, b.values, b.keys, b.values);
}
void store_across(const Tensor& state, const Tensor& total, const float* from, float* room, const Block& b,
                  const Team& team, int64_t n, int64_t head) {
  transpose(room, b.values, from, b.keys, b.values, b.keys);
  store_state(state, total, room, b, team, n, head);
}

// The weights' gradient, and from it that of the products q^T k.
template <Decay DECAY>
void weights_backward(const Gradients& g) {
  const Block& b = g.b;
  bool apart = DECAY == Decay::channel || b.in.bonus;  // the diagonal is another product
  transpose(g.v_across, BLOCK, b.v, b.values, BLOCK, b.values);
  for_tall_tiles(BLOCK, [&]<int ROWS, int WIDTH>(int64_t first) {
    Tile<ROWS, WIDTH> tile;
    tile.clear();
    tile.add_product({g.d_o + first * b.values, b.values, 1}, g.v_across, BLOCK, b.values);
    tile.store(g.d_weights + first * BLOCK, BLOCK);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int n = 0; n < WIDTH; n++) {
        int i = int(first) + r;
        Ints source = lane_numbers() + n * LANES;
        Vec gradient = tile.at[r][n];
        if (DECAY == Decay::token) gradient *= load(b.between + i * BLOCK + n * LANES);
        store(g.d_products + i * BLOCK + n * LANES, select(source <= (apart ? i - 1 : i), gradient, zeros()));
      }
  });
}

// d_q, d_k and d_v but for what depends on decays of channels inside the block; with decays of tokens also the sums
// over channels of what q reads and k writes, times their gradients: [BLOCK] each.
template <Decay DECAY>
void rows_backward(const Gradients& g, const float* state, const float* d_state, float* reads, float* writes) {
  const Block& b = g.b;
  Vec read_sums[BLOCK] = {}, write_sums[BLOCK] = {};
  auto decayed = [&]<int ROWS, int WIDTH>(Tile<ROWS, WIDTH>& tile, const float* by, int64_t i, int64_t d) {
    if constexpr (DECAY == Decay::token) tile.scale_rows(by + i);
    if constexpr (DECAY == Decay::channel)
      for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < WIDTH; n++) tile.at[r][n] *= load(by + (i + r) * b.keys + d + n * LANES);
  };
  auto sum_rows = [&]<int ROWS, int WIDTH>(Vec* sums, const Tile<ROWS, WIDTH>& tile, const float* rows, int64_t i,
                                           int64_t d) {
    if constexpr (DECAY == Decay::token)
      for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < WIDTH; n++) sums[i + r] += tile.at[r][n] * load(rows + (i + r) * b.keys + d + n * LANES);
  };
  for_tiles(BLOCK, b.keys, [&]<int ROWS, int WIDTH>(int64_t i, int64_t d) {
    Tile<ROWS, WIDTH> tile;
    tile.clear();
    tile.add_product({g.d_o + i * b.values, b.values, 1}, state + d, b.keys, b.values);
    decayed(tile, b.reach, i, d);
    sum_rows(read_sums, tile, b.q, i, d);
    if (DECAY != Decay::channel) add_triangle(tile, {g.d_products + i * BLOCK, BLOCK, 1}, b.k + d, b.keys, i);
    tile.store(g.d_q + i * b.keys + d, b.keys);
  });
  for_tiles(BLOCK, b.keys, [&]<int ROWS, int WIDTH>(int64_t j, int64_t d) {
    Tile<ROWS, WIDTH> tile;
    tile.clear();
    tile.add_product({b.v + j * b.values, b.values, 1}, d_state + d, b.keys, b.values);
    decayed(tile, b.rest, j, d);
    sum_rows(write_sums, tile, b.k, j, d);
    if (DECAY != Decay::channel)
      tile.add_product({g.d_products + j * BLOCK + j, 1, BLOCK}, b.q + j * b.keys + d, b.keys, BLOCK - j);
    tile.store(g.d_k + j * b.keys + d, b.keys);
  });
  transpose(g.writing_across, BLOCK, b.writing, b.keys, BLOCK, b.keys);
  for_tall_tiles(b.values, [&]<int ROWS, int WIDTH>(int64_t j) {
    Tile<ROWS, WIDTH> tile;
    tile.clear();
    tile.add_product({d_state + j * b.keys, b.keys, 1}, g.writing_across, BLOCK, b.keys);
    tile.add_product({g.d_o + j, 1, b.values}, b.weights, BLOCK, BLOCK);
    tile.store(g.d_v_across + j * BLOCK, BLOCK);
  });
  transpose(g.d_v, b.values, g.d_v_across, BLOCK, b.values, BLOCK);
  if (DECAY == Decay::token)
    for (int i = 0; i < BLOCK; i++) {
      reads[i] = sum(read_sums[i]);
      writes[i] = sum(write_sums[i]);
    }
}

// total * sum_v S dS of LANES channels
INLINE Vec total_backward(const Block& b, const float* state, const float* d_state, int64_t d) {
  Vec sums[4] = {};
  for (int64_t j = 0; j < b.values; j += 4)
    for (int i = 0; i < 4; i++) {
      int64_t at = (j + i) * b.keys + d;
      sums[i] += load(state + at) * load(d_state + at);
    }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) * (load(b.keep + d) + load(b.change + d));
}

// d g_s = the sum over j < s <= i of all that token i reads of token j, or of the state before (j < 0), and of all that
// is left behind (i past the end); with a bonus s < i.
void decays_of_tokens_backward(const Gradients& g, const float* reads, const float* writes, float total) {
  const Block& b = g.b;
  bool early = bool(b.in.bonus);
  Vec pairs[VECTORS] = {}, with_own[VECTORS];  // of each source, with receivers from s on
  float read = 0;
  for (int s = BLOCK - 1; s >= 0; s--) {
    float with_read = read + reads[s];
    Vec crossing = zeros();
    for (int n = 0; n < VECTORS; n++) {
      int64_t at = s * BLOCK + n * LANES;
      Ints before = lane_numbers() + n * LANES < s;
      with_own[n] = pairs[n] + select(before, load(g.d_weights + at) * load(b.weights + at), zeros());
      crossing += select(before, early ? pairs[n] : with_own[n], zeros());
      pairs[n] = with_own[n];
    }
    g.d_factor[s] = sum(crossing) + (early ? read : with_read);
    read = with_read;
  }
  float written = total;
  for (int s = 0; s < BLOCK; s++) {
    g.d_factor[s] += written;
    written += writes[s];
  }
}

// The same for LANES channels, and the rest of d_q and d_k: three sums over pairs of tokens, whose decays come one by
// one.
void channels_backward(const Gradients& g, Vec total, int64_t d) {
  const Block& b = g.b;
  int64_t keys = b.keys;
  bool early = bool(b.in.bonus);
  Vec a[BLOCK], k[BLOCK], asked[BLOCK], d_asked[BLOCK], d_k[BLOCK], d_g[BLOCK] = {};
  for (int i = 0; i < BLOCK; i++) {
    a[i] = load(b.factor + i * keys + d);
    k[i] = load(b.k + i * keys + d);
    asked[i] = load(b.asked + i * keys + d);
    d_asked[i] = load(g.d_q + i * keys + d);
    d_k[i] = load(g.d_k + i * keys + d);
  }
  Vec written = total, read = zeros();
  for (int s = 0; s < BLOCK; s++) {
    d_g[s] += written;
    written += k[s] * d_k[s];
  }
  for (int s = BLOCK - 1; s >= 0; s--) {
    d_g[s] += read;
    read += asked[s] * d_asked[s];
  }
  for (int i = 1; i < BLOCK; i++) {
    const float* gradient = g.d_products + i * BLOCK;
    Vec past[BLOCK];  // what token i gets back from tokens before s, seen from s
    Vec sources = k[0] * gradient[0];
    for (int s = 1; s < i; s++) {
      past[s] = sources * a[s];
      sources = past[s] + k[s] * gradient[s];
    }
    d_asked[i] += sources;
    Vec receiver = asked[i];
    for (int s = i - 1; s > 0; s--) {
      d_g[s] += receiver * past[s];
      receiver *= a[s];
    }
  }
  for (int j = 0; j < BLOCK - 1; j++) {
    Vec receivers = zeros();
    for (int i = BLOCK - 1; i > j; i--) receivers = receivers * a[i] + asked[i] * g.d_products[i * BLOCK + j];
    d_k[j] += receivers;
  }
  for (int i = 0; i < BLOCK; i++) {
    store(g.d_factor + i * keys + d, early ? d_g[i] : d_g[i] + asked[i] * d_asked[i]);
    store(g.d_q + i * keys + d, early ? d_asked[i] : d_asked[i] * a[i]);
    store(g.d_k + i * keys + d, d_k[i]);
  }
}

// Of q_i^T diag(u) k_i, the diagonal of the weights.
void own_backward(const Gradients& g) {
  const Block& b = g.b;
  for (int64_t d = 0; d < b.keys; d += LANES) {
    Vec bonus = load(b.bonus + d), d_bonus = load(g.d_bonus + d);
    for (int64_t i = 0; i < BLOCK; i++) {
      int64_t at = i * b.keys + d;
      float gradient = g.d_weights[i * BLOCK + i];
      Vec of_q = load(b.k + at) * gradient, of_k = load(b.q + at) * gradient;
      store(g.d_q + at, load(g.d_q + at) + of_q * bonus);
      store(g.d_k + at, load(g.d_k + at) + of_k * bonus);
      d_bonus += of_q * load(b.q + at);
    }
    store(g.d_bonus + d, d_bonus);
  }
}

template <Decay DECAY>
void block_backward(const Gradients& g, const float* state, float* d_state, const Ahead& ahead) {
  const Block& b = g.b;
  float reads[BLOCK], writes[BLOCK];
  weights_backward<DECAY>(g);
  rows_backward<DECAY>(g, state, d_state, reads, writes);
  if constexpr (DECAY == Decay::token) {
    Vec total = zeros();
    for (int64_t d = 0; d < b.keys; d += LANES) total += total_backward(b, state, d_state, d);
    decays_of_tokens_backward(g, reads, writes, sum(total));
  }
  if constexpr (DECAY == Decay::channel)
    for (int64_t d = 0; d < b.keys; d += LANES) channels_backward(g, total_backward(b, state, d_state, d), d);
  if (DECAY == Decay::channel || b.in.bonus) own_backward(g);
  grow(d_state, d_state, b, g.d_o, b.reading, ahead);
}

void write_gradients(const Gradients& g, const Sequence& s, int64_t head, int64_t t) {
  const Backward& x = g.x;
  const Block& b = g.b;
  bool large = x.in.large();
  store_rows(x.d_q, x.d_q.offset(s.row, t, head), g.d_q, b.keys, b.count, x.in.keys, large, float(x.in.scale));
  store_rows(x.d_k, x.d_k.offset(s.row, t, head), g.d_k, b.keys, b.count, x.in.keys, large);
  store_rows(x.d_v, x.d_v.offset(s.row, t, head), g.d_v, b.values, b.count, x.in.values, large);
  if (x.in.decay == Decay::channel)
    store_rows(x.d_log_decay, x.d_log_decay.offset(s.row, t, head), g.d_factor, b.keys, b.count, x.in.keys, large);
  if (x.in.decay != Decay::token) return;
  if (!x.decay_of_head)
    return write(x.d_log_decay, x.d_log_decay.offset(s.row, t, head), g.d_factor, b.count, x.d_log_decay.stride[1]);
  for (int64_t i = 0; i < b.count; i++) *g.d_decay_of_head += g.d_factor[i];
}

// All gradients of a group of tokens; dS goes from its end to its start. `states` has room for one before each block.
// The group that comes next is asked for from memory.
void group_backward(const Gradients& g, const Team& team, const Sequence& s, int64_t head, int64_t start, float* states,
                    float* d_state, int64_t next_head, int64_t next_start) {
  const Backward& x = g.x;
  Block& b = g.b;
  int64_t stop = std::min(s.stop, start + GROUP), size = b.keys * b.values, slot = x.in.slot(team.n, s, start);
  b.use_head(head);
  load_across(states, states + size, b, x.starts, x.starts_total, team, slot, head);
  for (int64_t t = start; t + BLOCK < stop; t += BLOCK, states += size) {
    b.load_written(s, team, head, t);
    Ahead ahead(std::min<int64_t>(BLOCK, stop - t - BLOCK));
    b.ask_written(ahead, s, team, head, t + BLOCK);
    if (t + 2 * BLOCK >= stop) g.ask_read(ahead, s, head, t + BLOCK);
    grow(states + size, states, b, b.v, b.writing, ahead);
  }
  std::fill(g.d_bonus, g.d_bonus + b.keys, 0.0f);
  *g.d_decay_of_head = 0;
  for (int64_t t = start + (stop - 1 - start) / BLOCK * BLOCK; t >= start; t -= BLOCK, states -= size) {
    b.load_written(s, team, head, t);
    b.load_reading(s, head, t);
    b.weigh();
    g.load_gradient(s, team, head, t);
    Ahead ahead(BLOCK);
    t > start ? g.ask_read(ahead, s, head, t - BLOCK) : b.ask_written(ahead, s, team, next_head, next_start);
    if (x.in.decay == Decay::none) block_backward<Decay::none>(g, states, d_state, ahead);
    if (x.in.decay == Decay::token) block_backward<Decay::token>(g, states, d_state, ahead);
    if (x.in.decay == Decay::channel) block_backward<Decay::channel>(g, states, d_state, ahead);
    write_gradients(g, s, head, t);
  }
  if (x.in.bonus) write(x.d_bonus, x.d_bonus.offset(slot, head), g.d_bonus, x.in.keys, 1);
  if (x.decay_of_head) *x.d_log_decay.at<float>(slot, head) = *g.d_decay_of_head;
}

int64_t last_group(const Sequence& s) { return s.start + (s.stop - s.start - 1) / GROUP * GROUP; }

// The direct way: each thread has whole heads.
void heads_backward(const Backward& x, const Team& team, const Sequence& s) {
  int64_t keys = round_up(x.in.keys, BLOCK), values = round_up(team.columns + x.in.normalize, BLOCK),
          size = keys * values;
  Scratch scratch(Block::bytes(keys, values) + Gradients::bytes(keys, values) +
                  4 * size * (GROUP / BLOCK + 1 + team.heads));
  Block block(x.in, team.columns, scratch);
  Gradients gradients(x, block, scratch);
  float *states = scratch.take(size * (GROUP / BLOCK + 1)), *d_states = scratch.take(size * team.heads);
  for (int64_t h = 0; h < team.heads; h++)
    load_across(d_states + h * size, states, block, x.d_last, x.d_last_total, team, team.n, team.head + h);
  for (int64_t start = last_group(s); start >= s.start && s.stop > s.start; start -= GROUP)
    for (int64_t h = 0; h < team.heads; h++) {
      bool last = h + 1 == team.heads;
      int64_t next = last ? team.head : team.head + h + 1, next_start = last ? std::max(s.start, start - GROUP) : start;
      group_backward(gradients, team, s, team.head + h, start, states, d_states + h * size, next, next_start);
    }
  for (int64_t h = 0; h < team.heads; h++)
    store_across(x.d_state, x.d_total, d_states + h * size, states, block, team, team.n, team.head + h);
}

// Where there are fewer heads than threads: first only the gradients of states at the ends of groups, by columns, ...
void ends_backward(const Backward& x, const Team& team, const Sequence& s) {
  int64_t keys = round_up(x.in.keys, BLOCK), values = round_up(team.columns + x.in.normalize, BLOCK),
          size = keys * values;
  int64_t whole = round_up(x.in.values + 1, BLOCK);
  Scratch scratch(Block::bytes(keys, values) + Gradients::bytes(keys, whole) + 4 * size * 2);
  Block block(x.in, team.columns, scratch);
  Gradients gradients(x, block, scratch);
  float *d_state = scratch.take(size), *room = scratch.take(size);
  for (int64_t head = team.head; head < team.head + team.heads; head++) {
    block.use_head(head);
    load_across(d_state, room, block, x.d_last, x.d_last_total, team, team.n, head);
    int64_t blocks = (s.stop - s.start + BLOCK - 1) / BLOCK;
    for (int64_t t = s.start + (blocks - 1) * BLOCK; t >= s.start; t -= BLOCK) {
      if (t + BLOCK >= s.stop || (t + BLOCK - s.start) % GROUP == 0)
        for (int64_t j = 0; j < team.columns + (team.first == 0 ? x.in.normalize : 0); j++) {
          int64_t row = j < team.columns ? team.first + j : x.in.values;
          write(x.ends, x.ends.offset(x.in.slot(team.n, s, t), head, row), d_state + j * keys, x.in.keys, 1);
        }
      block.load_written(s, team, head, t);
      block.load_reading(s, head, t);
      gradients.load_gradient(s, team, head, t);
      grow(d_state, d_state, block, gradients.d_o, block.reading, Ahead(0));
    }
    store_across(x.d_state, x.d_total, d_state, room, block, team, team.n, head);
  }
}

// ... then everything else, by groups of tokens.
void groups_backward(const Backward& x) {
  const Inputs& in = x.in;
  int64_t keys = round_up(in.keys, BLOCK), values = round_up(in.values + in.normalize, BLOCK), size = keys * values;
  int64_t groups = (in.length + GROUP - 1) / GROUP;
  parallel_ranges(in.sequences * in.heads * groups, [&](int64_t begin, int64_t end) {
    Scratch scratch(Block::bytes(keys, values) + Gradients::bytes(keys, values) + 4 * size * (GROUP / BLOCK + 2));
    Block block(in, in.values, scratch);
    Gradients gradients(x, block, scratch);
    float *states = scratch.take(size * (GROUP / BLOCK + 1)), *d_state = scratch.take(size);
    for (int64_t unit = begin; unit < end; unit++) {
      int64_t n = unit / (in.heads * groups), head = unit / groups % in.heads;
      Sequence s = in.sequence(n);
      int64_t start = s.start + unit % groups * GROUP;
      if (start >= s.stop) continue;
      std::fill(d_state, d_state + size, 0.0f);
      for (int64_t j = 0; j < in.values + in.normalize; j++)
        read(d_state + j * keys, x.ends, x.ends.offset(in.slot(n, s, start), head, j), in.keys, 1);
      group_backward(gradients, Team{n, head, 1, 0, in.values}, s, head, start, states, d_state, head,
                     std::min(start + GROUP, s.stop - 1));
    }
    end_streams();
  });
}

}  // namespace

KERNEL(linear_attention_backward, Backward) {
  const Inputs& in = arguments.in;
  for_teams(in, [&](const Team& team) {
    Sequence s = in.sequence(team.n);
    arguments.ends ? ends_backward(arguments, team, s) : heads_backward(arguments, team, s);
  });
  if (arguments.ends) groups_backward(arguments);
}

// The delta rule and diagonal plus low rank, block by block. See ops/delta.py for the recurrences.
//
// In a block the reads of its tokens are one triangular system, into which the state S before the block enters on the right
// (matrices and vectors as in blocks.h, 0 and 1 counting receivers and sources):
//
//   read = M_10 u + M_11 v + reach_1 S           u = beta (v - read), no second source     or     u = read
//   o    = M_00 u + M_01 v + reach_0 S           S' = total S + store_0 u + store_1 v
//
// Backwards, with x the gradient of u, z that of read, G that of o and D that of S' (primes of M mean transposed):
//
//   x = M_00' G + M_10' z + store_0' D           z = -beta x, dv = -z, dbeta = x (v - read)     or     z = x
//   dS = total D + reach_0' G + reach_1' z       dv = M_01' G + M_11' z + store_1' D
//   dM_0s = G values_s'   dM_1s = z values_s'    dreach_0 = G S'   dreach_1 = z S'   dstore_s = values_s D'
#pragma once
#include "blocks.h"
#include "meanwhile.h"

namespace low_rank {

// u, four tokens after four: what earlier ones wrote is a product, and among the four each uses those before it.
template <class RULE, class DECAY>
void solve(Block<RULE, DECAY>& x, Meanwhile& meanwhile) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(SIZE, x.values, [&]<int ROWS, int VECTORS>(int64_t i, int64_t c) {
    meanwhile.step();
    Tile<ROWS, VECTORS> tile;  // read, then u
    tile.clear();
    tile.add_product({x.reach[1] + i * x.keys, x.keys, 1}, x.state + c, x.values, x.keys);
    if constexpr (RULE::SOURCES == 2)
      add_lower<Triangle::strict>(tile, x.matrix[1][1], SIZE, i, x.v + c, x.values);
    const float* system = x.matrix[1][0] + i * SIZE;
    tile.add_product({system, SIZE, 1}, x.u + c, x.values, i);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) {
#pragma GCC unroll 16
        for (int earlier = 0; earlier < r; earlier++)
          tile.at[r][j] += system[r * SIZE + i + earlier] * tile.at[earlier][j];
        if constexpr (RULE::SOURCES == 1) {
          int64_t at = (i + r) * x.values + c + j * LANES;
          Vec error = load(x.v + at) - tile.at[r][j];
          store(x.error + at, error);
          tile.at[r][j] = x.beta[i + r] * error;
        }
      }
    tile.store(x.u + i * x.values + c, x.values);
  });
}

template <class RULE, class DECAY>
void output(const Block<RULE, DECAY>& x, float* o, Meanwhile& meanwhile) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(SIZE, x.values, [&]<int ROWS, int VECTORS>(int64_t i, int64_t c) {
    meanwhile.step();
    Tile<ROWS, VECTORS> tile;
    tile.clear();
    tile.add_product({x.reach[0] + i * x.keys, x.keys, 1}, x.state + c, x.values, x.keys);
    add_lower<Triangle::with_diagonal>(tile, x.matrix[0][0], SIZE, i, x.u + c, x.values);
    if constexpr (RULE::SOURCES == 2)
      add_lower<Triangle::with_diagonal>(tile, x.matrix[0][1], SIZE, i, x.v + c, x.values);
    tile.store(o + i * x.values + c, x.values);
  });
}

// The state after the block.
template <class RULE, class DECAY>
void advance(const Block<RULE, DECAY>& x, float* after, Meanwhile& meanwhile) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(x.keys, x.values, [&]<int ROWS, int VECTORS>(int64_t d, int64_t c) {
    meanwhile.step();
    Tile<ROWS, VECTORS> tile;
    tile.load(x.state + d * x.values + c, x.values);
    tile.scale_rows(x.total + d);
    tile.add_product({x.store[0] + d * SIZE, SIZE, 1}, x.u + c, x.values, SIZE);
    if constexpr (RULE::SOURCES == 2)
      tile.add_product({x.store[1] + d * SIZE, SIZE, 1}, x.v + c, x.values, SIZE);
    tile.store(after + d * x.values + c, x.values);
  });
}

// What a group's backward pass works with, beside the blocks.
template <class RULE, class DECAY>
struct Workspace {
  Gradients<RULE, DECAY> gradient;
  float *d_state, *d_o, *d_read, *d_v;                       // [keys, values], [SIZE, values] each
  float *values_transposed, *state_transposed, *d_transposed;  // [values, SIZE], [values, keys] twice
  float* d_beta;                                             // [SIZE]

  template <class Memory>
  void place(Memory& memory, int64_t keys, int64_t values) {
    constexpr int SIZE = DECAY::SIZE;
    gradient.place(memory, keys);
    d_state = memory.take(keys * values);
    d_o = memory.take(SIZE * values);
    d_read = memory.take(SIZE * values);
    d_v = memory.take(SIZE * values);
    values_transposed = memory.take(SIZE * values);
    state_transposed = memory.take(keys * values);
    d_transposed = memory.take(keys * values);
    d_beta = memory.take(SIZE);
  }
};

// z and the gradients of v and beta, four tokens before four.
template <class RULE, class DECAY>
void solve_backward(const Block<RULE, DECAY>& x, Workspace<RULE, DECAY>& w) {
  constexpr int SIZE = DECAY::SIZE;
  std::fill(w.d_beta, w.d_beta + SIZE, 0.0f);
  for_tiles(SIZE, x.values, [&]<int ROWS, int VECTORS>(int64_t above, int64_t c) {
    const int64_t i = SIZE - ROWS - above;
    Tile<ROWS, VECTORS> tile;  // x, then z
    tile.clear();
    tile.add_product({x.store[0] + i, 1, SIZE}, w.d_state + c, x.values, x.keys);
    add_upper<Triangle::with_diagonal>(tile, x.matrix[0][0], SIZE, i, w.d_o + c, x.values);
    const float* system = x.matrix[1][0] + i;
    const int64_t after = i + ROWS;
    tile.add_product({system + after * SIZE, 1, SIZE}, w.d_read + after * x.values + c, x.values, SIZE - after);
#pragma GCC unroll 16
    for (int r = ROWS - 1; r >= 0; r--) {
      Vec of_beta = zeros();
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) {
#pragma GCC unroll 16
        for (int later = r + 1; later < ROWS; later++)
          tile.at[r][j] += system[(i + later) * SIZE + r] * tile.at[later][j];
        if constexpr (RULE::SOURCES == 1) {
          int64_t at = (i + r) * x.values + c + j * LANES;
          of_beta += tile.at[r][j] * load(x.error + at);
          tile.at[r][j] *= x.beta[i + r];
          store(w.d_v + at, tile.at[r][j]);
          tile.at[r][j] = -tile.at[r][j];
        }
      }
      w.d_beta[i + r] += sum(of_beta);
    }
    tile.store(w.d_read + i * x.values + c, x.values);
  });
}

template <class DECAY>
void second_source_backward(const Block<LowRankRule, DECAY>& x, Workspace<LowRankRule, DECAY>& w) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(SIZE, x.values, [&]<int ROWS, int VECTORS>(int64_t i, int64_t c) {
    Tile<ROWS, VECTORS> tile;
    tile.clear();
    tile.add_product({x.store[1] + i, 1, SIZE}, w.d_state + c, x.values, x.keys);
    add_upper<Triangle::with_diagonal>(tile, x.matrix[0][1], SIZE, i, w.d_o + c, x.values);
    add_upper<Triangle::strict>(tile, x.matrix[1][1], SIZE, i, w.d_read + c, x.values);
    tile.store(w.d_v + i * x.values + c, x.values);
  });
}

// The gradients of products, receivers and sources that the state's decay does not enter any more.
template <class RULE, class DECAY>
void products_backward(const Block<RULE, DECAY>& x, Workspace<RULE, DECAY>& w, Meanwhile& meanwhile) {
  constexpr int SIZE = DECAY::SIZE;
  transpose(w.state_transposed, x.keys, x.state, x.values, x.keys, x.values);
  transpose(w.d_transposed, x.keys, w.d_state, x.values, x.keys, x.values);
  const float *reads[2] = {w.d_o, w.d_read}, *values[2] = {x.u, x.v};
  auto multiply_all = [&](float* product, const float* rows, const float* state_transposed) {
    for_tiles(SIZE, x.keys, [&]<int ROWS, int VECTORS>(int64_t i, int64_t d) {
      meanwhile.step();
      Tile<ROWS, VECTORS> tile;
      tile.clear();
      tile.add_product({rows + i * x.values, x.values, 1}, state_transposed + d, x.keys, x.values);
      tile.store(product + i * x.keys + d, x.keys);
    });
  };
  for (int s = 0; s < RULE::SOURCES; s++) {
    transpose(w.values_transposed, SIZE, values[s], x.values, SIZE, x.values);
    for (int r = 0; r < 2; r++) multiply_lower<SIZE>(w.gradient.matrix[r][s], reads[r], w.values_transposed, x.values);
    multiply_all(w.gradient.store[s], values[s], w.d_transposed);
  }
  for (int r = 0; r < 2; r++) multiply_all(w.gradient.reach[r], reads[r], w.state_transposed);
  for (int64_t d = 0; d < x.keys; d += LANES) {
    Vec along = zeros();
    for (int64_t at = d; at < x.values * x.keys; at += x.keys)
      along += load(w.state_transposed + at) * load(w.d_transposed + at);
    store(w.gradient.total + d, along * load(x.total + d));
  }
}

// The gradient of the state before the block from that of the state after it, in place.
template <class RULE, class DECAY>
void advance_backward(const Block<RULE, DECAY>& x, Workspace<RULE, DECAY>& w, Meanwhile& meanwhile) {
  constexpr int SIZE = DECAY::SIZE;
  for_tiles(x.keys, x.values, [&]<int ROWS, int VECTORS>(int64_t d, int64_t c) {
    meanwhile.step();
    Tile<ROWS, VECTORS> tile;
    float* at = w.d_state + d * x.values + c;
    tile.load(at, x.values);
    tile.scale_rows(x.total + d);
    tile.add_product({x.reach[0] + d, 1, x.keys}, w.d_o + c, x.values, SIZE);
    tile.add_product({x.reach[1] + d, 1, x.keys}, w.d_read + c, x.values, SIZE);
    tile.store(at, x.values);
  });
}

}  // namespace low_rank

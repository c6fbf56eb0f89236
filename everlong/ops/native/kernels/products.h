// Matrix products whose operands lie in the cache: a tile of the result stays in registers.
#pragma once
#include "simd.h"

// How many rows and vectors a tile has: enough independent sums to keep the multipliers busy, and no spills.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 4, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif

// A matrix operand that is read number by number: element (i, j) stands at data[i * row + j * column].
struct Matrix {
  const float* data;
  int64_t row, column;
  INLINE Matrix from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  INLINE Matrix transposed() const { return {data, column, row}; }
};

template <int ROWS, int VECTORS>
struct Tile {
  Vec at[ROWS][VECTORS];

  INLINE void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) at[i][j] = zeros();
  }
  INLINE void load(const float* from, int64_t row) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) at[i][j] = ::load(from + i * row + j * LANES);
  }
  INLINE void store(float* to, int64_t row) const {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) ::store(to + i * row + j * LANES, at[i][j]);
  }
  INLINE void scale(float by) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) at[i][j] *= by;
  }
  INLINE void scale_rows(const float* by) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) at[i][j] *= by[i];
  }
  // += A[ROWS, depth] B[depth, VECTORS * LANES]; rows of B lie `row` apart.
  INLINE void add_product(Matrix a, const float* b, int64_t row, int64_t depth) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; k++) {
      Vec of_b[VECTORS];
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) of_b[j] = ::load(b + k * row + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        Vec of_a = broadcast(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; j++) at[i][j] += of_a * of_b[j];
      }
    }
  }
};

// Calls visit.operator()<ROWS, VECTORS>(i, j) for tiles that cover `rows` (a multiple of TILE_ROWS) and `columns` (a
// multiple of LANES).
template <class Visit>
INLINE void for_tiles(int64_t rows, int64_t columns, Visit visit) {
  for (int64_t i = 0; i < rows; i += TILE_ROWS) {
    int64_t j = 0;
    for (; j + TILE_VECTORS * LANES <= columns; j += TILE_VECTORS * LANES)
      visit.template operator()<TILE_ROWS, TILE_VECTORS>(i, j);
    if constexpr (TILE_VECTORS > 2) {
      if (j + 2 * LANES <= columns) {
        visit.template operator()<TILE_ROWS, 2>(i, j);
        j += 2 * LANES;
      }
    }
    if (j < columns) visit.template operator()<TILE_ROWS, 1>(i, j);
  }
}

// C = A B, or C += A B: A[rows, depth], B[depth, columns] with rows `b_row` apart, C with rows `c_row` apart.
enum class Into { nothing, result };
template <Into INTO = Into::nothing>
INLINE void multiply(float* c, int64_t c_row, Matrix a, const float* b, int64_t b_row, int64_t rows, int64_t columns,
                     int64_t depth) {
  for_tiles(rows, columns, [&]<int ROWS, int VECTORS>(int64_t i, int64_t j) {
    Tile<ROWS, VECTORS> tile;
    if constexpr (INTO == Into::result) {
      tile.load(c + i * c_row + j, c_row);
    } else {
      tile.clear();
    }
    tile.add_product(a.from(i, 0), b + j, b_row, depth);
    tile.store(c + i * c_row + j, c_row);
  });
}

// to[columns, rows] = from[rows, columns] transposed; both a multiple of LANES.
INLINE void transpose(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < columns; j += LANES) {
      Vec block[LANES];
#pragma GCC unroll 16
      for (int k = 0; k < LANES; k++) block[k] = load(from + (i + k) * from_row + j);
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < LANES; k++) store(to + (j + k) * to_row + i, block[k]);
    }
}

// What test_tiles.py runs: every function of tiles.h against one number at a time. Prints what fails, and whether the
// products were made by tiles.
#include "tiles.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

using Numbers = std::vector<bfloat16>;
using Pairs = std::vector<Pair>;
using Floats = std::vector<float>;

static int failures = 0;
static void expect(bool right, const char* what) {
  if (!right && ++failures < 20) printf("%s\n", what);
}

static float random_number() { return float(rand()) / float(RAND_MAX) * 2 - 1; }
static Numbers random_numbers(int64_t count) {
  Numbers x(count);
  for (bfloat16& number : x) narrow(random_number(), &number);
  return x;
}
static uint16_t bits(float x) {
  bfloat16 y;
  narrow(x, &y);
  return y.bits;
}
static uint16_t of_pairs(const Pairs& pairs, int64_t row, int64_t i, int64_t j) {
  return uint16_t(pairs[i / 2 * row + j] >> (i & 1 ? 16 : 0));
}

// found(i, j) == truth(i, j) for all elements
template <class Found, class Truth>
static void compare(const char* what, int64_t rows, int64_t columns, Found found, Truth truth) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) expect(found(i, j) == truth(i, j), what);
}

static void packing(int64_t rows, int64_t columns, int64_t row) {
  Numbers x = random_numbers(rows * row), y(rows * columns);
  Pairs pairs(rows * columns), words(rows * columns);
  Floats by(rows + columns), wide(rows * row);
  for (float& number : by) number = random_number();
  for (float& number : wide) number = random_number();
  auto given = [&](int64_t i, int64_t j) { return x[i * row + j].bits; };
  auto times = [&](int64_t i, int64_t j, int64_t k) { return bits(widen(x[i * row + j]) * by[k]); };
  auto paired = [&](int64_t i, int64_t j) { return of_pairs(pairs, columns, i, j); };
  auto rowed = [&](int64_t i, int64_t j) { return y[i * columns + j].bits; };

  pair_rows(pairs.data(), columns, x.data(), row, rows, columns);
  compare("pair_rows", rows, columns, paired, given);
  unpair_rows(y.data(), columns, pairs.data(), columns, rows, columns);
  compare("unpair_rows", rows, columns, rowed, given);
  unpair_scaled_columns(y.data(), columns, pairs.data(), columns, rows, columns, by.data());
  compare("unpair_scaled_columns", rows, columns, rowed, [&](int64_t i, int64_t j) { return times(i, j, j); });
  transpose(y.data(), rows, pairs.data(), columns, rows, columns);
  compare("transpose of pairs", columns, rows, [&](int64_t i, int64_t j) { return y[i * rows + j].bits; },
          [&](int64_t i, int64_t j) { return given(j, i); });
  transpose(words.data(), rows, x.data(), row, rows, columns);
  compare("transpose to pairs", columns, rows, [&](int64_t i, int64_t j) { return of_pairs(words, rows, i, j); },
          [&](int64_t i, int64_t j) { return given(j, i); });
  pair_scaled_rows(pairs.data(), columns, x.data(), row, rows, columns, by.data());
  compare("pair_scaled_rows", rows, columns, paired, [&](int64_t i, int64_t j) { return times(i, j, i); });
  scale_rows(y.data(), columns, x.data(), row, rows, columns, by.data());
  compare("scale_rows", rows, columns, rowed, [&](int64_t i, int64_t j) { return times(i, j, i); });
  auto rounded_wide = [&](int64_t i, int64_t j) { return bits(wide[i * row + j]); };
  pair_rows(pairs.data(), columns, wide.data(), row, rows, columns);
  compare("pair_rows of float32", rows, columns, paired, rounded_wide);
  round_rows(y.data(), columns, wide.data(), row, rows, columns);
  compare("round_rows", rows, columns, rowed, rounded_wide);
}

static void products(int64_t rows, int64_t columns, int64_t depth) {
  int64_t a_row = depth + 7, b_row = columns + 16, c_row = columns + 5;
  Numbers a = random_numbers(rows * a_row), b = random_numbers(depth * b_row);
  Pairs pairs(depth / 2 * b_row);
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t j = 0; j < b_row; j++)
      pairs[k / 2 * b_row + j] = b[k * b_row + j].bits | Pair(b[(k + 1) * b_row + j].bits) << 16;
  Product product{a.data(), a_row, pairs.data(), b_row, depth};
  Floats c(rows * c_row, 1.0f);
  auto check = [&](const char* what, double times, double before) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < c_row; j++) {
        double truth = 0, size = 1;
        for (int64_t k = 0; k < depth; k++) {
          double term = double(widen(a[i * a_row + k])) * widen(b[k * b_row + j % columns]);
          truth += term;
          size += std::fabs(term);
        }
        if (j < columns) expect(std::fabs(c[i * c_row + j] - times * truth - before) <= 1e-6 * times * size, what);
        if (j >= columns) expect(c[i * c_row + j] == 1.0f, "beyond the columns");
      }
  };
  multiply<Into::result>(c.data(), c_row, rows, columns, product);
  check("added to what was there", 1, 1);
  multiply(c.data(), c_row, rows, columns, product);
  check("one product", 1, 0);
  multiply(c.data(), c_row, rows, columns, product, product);
  check("two products", 2, 0);
}

int main() {
  TileRegisters tiles;
  for (int64_t rows : {16, 32, 48, 80})
    for (int64_t columns : {16, 32, 48, 96})
      for (int64_t depth : {32, 64, 96}) products(rows, columns, depth);
  for (int64_t rows : {32, 64})
    for (int64_t columns : {32, 96})
      for (int64_t row : {columns, columns + 5}) packing(rows, columns, row);
#if defined(HAS_AMX)
  printf(amx_allowed() ? "tiles\n" : "no tiles\n");
#else
  printf("no tiles\n");
#endif
  return failures ? 1 : 0;
}

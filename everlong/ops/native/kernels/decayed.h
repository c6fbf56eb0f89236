// The products of a block's receivers and sources under the decays a = e^g between them, and their gradients.
//
//   matrix[r][s](i, j) = sum_d receiver[r](i, d) source[s](j, d) a_{j+1}(d) ... a_i(d)        j <= i; j < i for r = 1
//   reach[r](i, d) = receiver[r](i, d) a_1(d) ... a_i(d)         store[s](d, j) = source[s](j, d) a_{j+1}(d) ... a_SIZE(d)
//
// (a late receiver has a_{i-1} for a_i). Decays are multiplied one after another, never divided and never exponentials of
// differences: so they are exact after a decay to nothing, and each gradient of a log-decay is a sum of just those weights
// that contain it.
#pragma once
#include "blocks.h"

namespace low_rank {

// One decay a token, or none. Without a decay late receivers are like the others; with one there is no rule that has both.
struct TokenDecay {
  static constexpr int SIZE = 32, VECTORS = SIZE / LANES;
  bool present;
  float* factor;   // [SIZE]
  float* between;  // [SIZE, SIZE]
  float* reach;    // [SIZE]
  const float* store() const { return between + (SIZE - 1) * SIZE; }

  template <class Memory>
  void place(Memory& memory, int64_t) {
    factor = memory.take(SIZE);
    between = memory.take(SIZE * SIZE);
    reach = memory.take(SIZE);
  }

  // `count` tokens of g; the others do not fade.
  void read_from(const Tensor& g, int64_t offset, int64_t count, int64_t, int64_t) {
    present = bool(g);
    std::fill(factor, factor + SIZE, 0.0f);
    if (present) read(factor, g, offset, count, g.stride[1]);
    for (int i = 0; i < SIZE; i += LANES) ::store(factor + i, present ? exp(load(factor + i)) : broadcast(1.0f));
    multiply_factors();
  }

  void multiply_factors() {
    Vec row[VECTORS] = {};
    float running = 1.0f;
    for (int i = 0; i < SIZE; i++) {
      running *= factor[i];
      reach[i] = running;
      for (int j = 0; j < VECTORS; j++) {
        row[j] = select(lane_numbers() + j * LANES == i, broadcast(1.0f), row[j] * factor[i]);
        ::store(between + i * SIZE + j * LANES, row[j]);
      }
    }
  }

  template <class RULE>
  static void multiply(Block<RULE, TokenDecay>& x) {
    const TokenDecay& decay = x.decay;
    for (int r = 0; r < 2; r++)
      for (int i = 0; i < SIZE; i++)
        for (int64_t d = 0; d < x.keys; d += LANES)
          ::store(x.reach[r] + i * x.keys + d, load(x.receiver[r] + i * x.keys + d) * decay.reach[i]);
    for (int s = 0; s < RULE::SOURCES; s++) {
      transpose(x.store[s], SIZE, x.source[s], x.keys, SIZE, x.keys);
      for (int r = 0; r < 2; r++) {
        multiply_lower<SIZE>(x.matrix[r][s], x.receiver[r], x.store[s], x.keys);
        if (decay.present) weigh(x.matrix[r][s], decay.between);
      }
      for (int64_t d = 0; d < x.keys; d++)
        for (int j = 0; j < SIZE; j += LANES) {
          float* at = x.store[s] + d * SIZE + j;
          ::store(at, load(at) * load(decay.store() + j));
        }
    }
    std::fill(x.total, x.total + x.keys, decay.reach[SIZE - 1]);
  }

  static void weigh(float* matrix, const float* by) {
    for (int i = 0; i < SIZE; i++)
      for (int j = 0; j <= i; j += LANES) {
        float* at = matrix + i * SIZE + j;
        ::store(at, load(at) * load(by + i * SIZE + j));
      }
  }

  template <class RULE>
  static void multiply_backward(const Block<RULE, TokenDecay>& x, Gradients<RULE, TokenDecay>& gradient) {
    const TokenDecay& decay = x.decay;
    if (decay.present) {
      differentiate(x, gradient);
      for (auto& row : gradient.matrix)
        for (float* matrix : row) weigh(matrix, decay.between);
    }
    for_tiles(SIZE, x.keys, [&]<int ROWS, int COLUMNS>(int64_t i, int64_t d) {
      Tile<ROWS, COLUMNS> tile;
      int64_t at = i * x.keys + d;
      for (int r = 0; r < 2; r++) {
        tile.load(gradient.reach[r] + at, x.keys);
        tile.scale_rows(decay.reach + i);
        for (int s = 0; s < RULE::SOURCES; s++) {
          const float *matrix = gradient.matrix[r][s], *source = x.source[s] + d;
          if (r == 0) {
            add_lower<Triangle::with_diagonal>(tile, matrix, SIZE, i, source, x.keys);
          } else {
            add_lower<Triangle::strict>(tile, matrix, SIZE, i, source, x.keys);
          }
        }
        tile.store(gradient.receiver[r] + at, x.keys);
      }
      for (int s = 0; s < RULE::SOURCES; s++) {
        tile.load(gradient.store[s] + at, x.keys);
        tile.scale_rows(decay.store() + i);
        add_upper<Triangle::with_diagonal>(tile, gradient.matrix[0][s], SIZE, i, x.receiver[0] + d, x.keys);
        add_upper<Triangle::strict>(tile, gradient.matrix[1][s], SIZE, i, x.receiver[1] + d, x.keys);
        tile.store(gradient.source[s] + at, x.keys);
      }
    });
  }

  // dg_t sums the gradients of the logarithms of all weights from a source before t to a receiver at t or after it;
  // the state before the block is a source, and the state after it a receiver.
  template <class RULE>
  static void differentiate(const Block<RULE, TokenDecay>& x, Gradients<RULE, TokenDecay>& gradient) {
    Vec from_start = zeros(), to_end = zeros(), of_store[SIZE], of_source[VECTORS] = {};
    for (int64_t d = 0; d < x.keys; d += LANES) from_start += load(gradient.total + d);
    for (int j = 0; j < SIZE; j++) {
      of_store[j] = to_end;  // of the sources before j
      for (int s = 0; s < RULE::SOURCES; s++)
        to_end += dots(x.source[s] + j * x.keys, gradient.store[s] + j * x.keys, x.keys) * x.decay.store()[j];
    }
    for (int t = SIZE - 1; t >= 0; t--) {
      for (int r = 0; r < 2; r++)
        from_start += dots(x.reach[r] + t * x.keys, gradient.reach[r] + t * x.keys, x.keys);
      Vec across = of_store[t] + from_start;
      for (int j = 0; j < VECTORS; j++) {
        Ints before = lane_numbers() + j * LANES < t;
        for (int r = 0; r < 2; r++)
          for (int s = 0; s < RULE::SOURCES; s++) {
            int64_t at = t * SIZE + j * LANES;
            of_source[j] += select(before, load(x.matrix[r][s] + at) * load(gradient.matrix[r][s] + at), zeros());
          }
        across += select(before, of_source[j], zeros());
      }
      gradient.log_decay[t] = sum(across);
    }
  }
};

// A decay for each key channel.
struct ChannelDecay {
  static constexpr int SIZE = 16, ROWS = 4;
  float* factor;  // [SIZE, keys]

  template <class Memory>
  void place(Memory& memory, int64_t keys) {
    factor = memory.take(SIZE * keys);
  }

  void read_from(const Tensor& g, int64_t offset, int64_t count, int64_t channels, int64_t keys) {
    std::fill(factor, factor + SIZE * keys, 0.0f);
    for (int64_t i = 0; i < count; i++) read(factor + i * keys, g, offset + i * g.stride[1], channels, g.stride[3]);
    for (int64_t i = 0; i < SIZE * keys; i += LANES) ::store(factor + i, exp(load(factor + i)));
  }

  template <class RULE>
  static void multiply(Block<RULE, ChannelDecay>& x) {
    for (int64_t d = 0; d < x.keys; d += LANES) {
      Vec running = broadcast(1.0f);
      for (int64_t at = d; at < SIZE * x.keys; at += x.keys) {
        Vec before = running;
        running *= load(x.decay.factor + at);
        ::store(x.reach[0] + at, load(x.receiver[0] + at) * running);
        ::store(x.reach[1] + at, load(x.receiver[1] + at) * (RULE::LATE ? before : running));
      }
      ::store(x.total + d, running);
    }
    for (int s = 0; s < RULE::SOURCES; s++) {
      std::fill(x.store[s], x.store[s] + x.keys * SIZE, 0.0f);
      for (int i = 0; i < SIZE; i += ROWS)
        for (int j = 0; j <= i; j += LANES) receive(x, s, i, j);
    }
  }

  // `store` holds the sources up to now, a column each, and is aged from token to token: receivers i .. i + ROWS read
  // columns j .. j + LANES of it.
  template <class RULE>
  static INLINE void receive(Block<RULE, ChannelDecay>& x, int s, int i, int j) {
    const int64_t keys = x.keys;
    const float *first = x.receiver[0] + i * keys, *second = x.receiver[1] + i * keys;
    const float *source = x.source[s] + i * keys, *factor = x.decay.factor + i * keys;
    Vec found[2][ROWS] = {};
    Ints lane = lane_numbers() + (j - i);
    for (int64_t d = 0; d < keys; d++) {
      Vec aged = load(x.store[s] + d * SIZE + j);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        int64_t at = r * keys + d;
        if constexpr (RULE::LATE) found[1][r] += second[at] * aged;
        aged = select(lane == r, broadcast(source[at]), aged * factor[at]);
        if constexpr (!RULE::LATE) found[1][r] += second[at] * aged;
        found[0][r] += first[at] * aged;
      }
      ::store(x.store[s] + d * SIZE + j, aged);
    }
    for (int r = 0; r < ROWS; r++)
      for (int receiver = 0; receiver < 2; receiver++)
        ::store(x.matrix[receiver][s] + (i + r) * SIZE + j, found[receiver][r]);
  }

  template <class RULE>
  static void multiply_backward(const Block<RULE, ChannelDecay>& x, Gradients<RULE, ChannelDecay>& gradient) {
    for (int64_t d = 0; d < x.keys; d += LANES) differentiate(x, gradient, d);
  }

  // LANES channels from d on. aged[i][j] is source j as receiver i finds it; d_aged[j], backwards through the tokens, is
  // its gradient.
  template <class RULE>
  static void differentiate(const Block<RULE, ChannelDecay>& x, Gradients<RULE, ChannelDecay>& gradient, int64_t d) {
    constexpr int SOURCES = RULE::SOURCES;
    auto row = [&](const float* of, int i) { return load(of + i * x.keys + d); };
    Vec running[SIZE + 1], aged[SOURCES][SIZE][SIZE], d_aged[SOURCES][SIZE];
    running[0] = broadcast(1.0f);
    for (int i = 0; i < SIZE; i++) {
      Vec factor = row(x.decay.factor, i);
      running[i + 1] = running[i] * factor;
      for (int s = 0; s < SOURCES; s++) {
        for (int j = 0; j < i; j++) aged[s][i][j] = aged[s][i - 1][j] * factor;
        aged[s][i][i] = row(x.source[s], i);
        d_aged[s][i] = row(gradient.store[s], i);
      }
    }
    Vec from_start = load(gradient.total + d);
    for (int i = SIZE - 1; i >= 0; i--) {
      Vec factor = row(x.decay.factor, i), first = row(x.receiver[0], i), second = row(x.receiver[1], i);
      Vec d_first = row(gradient.reach[0], i) * running[i + 1];
      Vec d_second = row(gradient.reach[1], i) * running[RULE::LATE ? i : i + 1];
      from_start += first * d_first;
      if constexpr (!RULE::LATE) from_start += second * d_second;
      Vec across = zeros();
      for (int s = 0; s < SOURCES; s++) {
        const float *of_first = gradient.matrix[0][s] + i * SIZE, *of_second = gradient.matrix[1][s] + i * SIZE;
        for (int j = 0; j < i; j++) {
          Vec found = aged[s][i][j], d_found = d_aged[s][j] + of_first[j] * first;
          d_first += of_first[j] * found;
          if constexpr (!RULE::LATE) {
            d_found += of_second[j] * second;
            d_second += of_second[j] * found;
          }
          across += d_found * found;
          d_found *= factor;
          if constexpr (RULE::LATE) {
            d_found += of_second[j] * second;
            d_second += of_second[j] * aged[s][i - 1][j];
          }
          d_aged[s][j] = d_found;
        }
        d_first += of_first[i] * aged[s][i][i];
        ::store(gradient.source[s] + i * x.keys + d, d_aged[s][i] + of_first[i] * first);
      }
      ::store(gradient.log_decay + i * x.keys + d, from_start + across);
      if constexpr (RULE::LATE) from_start += second * row(gradient.reach[1], i) * running[i];
      ::store(gradient.receiver[0] + i * x.keys + d, d_first);
      ::store(gradient.receiver[1] + i * x.keys + d, d_second);
    }
  }
};

}  // namespace low_rank

// Linear attention in bfloat16, backward: products of bfloat16 numbers, sums and states in float32.
//
// With P, D = scale * between and the chunk's first state S as in the forward pass, dS the gradient of the state after it:
//
//     P^T = (K Q^T) * D^T                     dP^T = (V dO^T) * D^T                       upper triangles
//     dQ = [scale reach dO | dP] [S^T ; K]    dK = [store V | dP^T] [dS^T ; Q]    dV = [store K | P^T] [dS ; dO]
//     dS^T = total dS^T + dO^T (scale reach Q)
//
// A gate stands in every product of a later token i with an earlier one j, so with `a` for the part from the state
//
//     dg_t = sum over i >= t > j of P_ij dO_i.v_j  +  over i >= t of q_i.dQ_i(a)  +  over j < t of k_j.dK_j(a)  +  total S.dS
//
// States are kept transposed here, for two of three products read them so. Those inside a group are made once more from
// the one that was saved before it.
#include "linear_attention_bf16.h"

namespace linear_attention_bf16 {
namespace {

struct Backward {
  Tensor q, k, v, log_decay, cu_seqlens, saved, d_o, d_last;  // as in the forward pass
  Tensor d_q, d_k, d_v, d_log_decay, d_state;  // [B, T, H, K] twice, [B, T, H, V], [B, T, H] or [N, H], [N, H, K, V]
  int64_t sequences, length, heads, keys, values, sharing;
  int64_t decay_of_head;  // d_log_decay is [N, H]: the sum over the tokens
  double scale;
};

struct Memory {
  // The tokens' numbers, where they are no whole blocks.
  bfloat16 *q, *k, *v, *d_o;
  // A: row by row.
  bfloat16 *d_o_transposed, *reached_d_o, *stored_keys, *ends_by_value;
  bfloat16 *weights_transposed, *d_weights_transposed, *d_weights;
  // B: in pairs.
  Pair *queries_transposed, *d_o_columns, *queries, *reached_queries, *d_o_pairs, *keys, *starts, *ends, *ends_transposed;
  Pair* d_weights_pairs;
  // float32: of tokens, of pairs of tokens, of products, of states.
  float *gates, *reach, *store, *received, *sent, *reached, *stored;
  float *between, *products, *d_products, *state, *other_state, *d_states;

  template <class From>
  Memory(From& from, int64_t wide_keys, int64_t wide_values) {
    int64_t of_keys = CHUNK * wide_keys, of_values = CHUNK * wide_values, of_state = wide_keys * wide_values;
    for (bfloat16** x : {&q, &k, &stored_keys}) *x = from.template take<bfloat16>(of_keys);
    for (bfloat16** x : {&v, &d_o, &d_o_transposed, &reached_d_o})
      *x = from.template take<bfloat16>(of_values);
    for (bfloat16** x : {&weights_transposed, &d_weights_transposed, &d_weights})
      *x = from.template take<bfloat16>(CHUNK * CHUNK);
    ends_by_value = from.template take<bfloat16>(of_state);
    for (Pair** x : {&queries_transposed, &queries, &reached_queries, &keys}) *x = from.template take<Pair>(of_keys / 2);
    for (Pair** x : {&d_o_columns, &d_o_pairs}) *x = from.template take<Pair>(of_values / 2);
    for (Pair** x : {&ends, &ends_transposed}) *x = from.template take<Pair>(of_state / 2);
    starts = from.template take<Pair>(GROUP / CHUNK * of_state / 2);
    d_weights_pairs = from.template take<Pair>(CHUNK * CHUNK / 2);
    for (float** x : {&gates, &reach, &store, &received, &reached, &stored}) *x = from.take(CHUNK + 1);
    sent = from.take(CHUNK * LANES);
    between = from.take(CHUNK * CHUNK);
    for (float** x : {&products, &d_products}) *x = from.take(BLOCK * BLOCK);
    for (float** x : {&state, &other_state}) *x = from.take(of_state);
    d_states = from.take(HEADS * of_state);
  }
};

// One head of one sequence.
template <bool DECAYS>
class Head {
  const Backward& x;
  const Memory& m;
  int64_t head;
  Channels keys, values;
  Span at{};
  Rows q{}, k{}, v{}, d_o{};

  void take(Span span) {
    at = span;
    k = rows_of(x.k, at, head / x.sharing, keys, m.k);
    v = rows_of(x.v, at, head, values, m.v);
    if constexpr (DECAYS) {
      read_gates(m.gates, x.log_decay, at, head);
      m.gates[at.rows()] = 1.0f;
    }
  }

  // S^T = total S^T + V^T (store K)
  void advance() {
    int64_t rows = at.rows(), size = keys.wide * values.wide;
    transpose(m.d_o_columns, CHUNK, v.data, v.row, rows, values.wide);
    unpair_rows(m.d_o_transposed, CHUNK, m.d_o_columns, CHUNK, values.wide, rows);
    if constexpr (DECAYS) {
      float product = 1.0f;
      for (int64_t j = rows - 1; j >= 0; j--) {
        m.store[j] = product;
        product *= m.gates[j];
      }
      pair_scaled_rows(m.reached_queries, keys.wide, k.data, k.row, rows, keys.wide, m.store);
      for (int64_t i = 0; i < size; i += LANES) ::store(m.state + i, load(m.state + i) * product);
    } else {
      pair_rows(m.reached_queries, keys.wide, k.data, k.row, rows, keys.wide);
    }
    multiply<Into::result>(m.state, keys.wide, values.wide, keys.wide,
                           Product{m.d_o_transposed, CHUNK, m.reached_queries, keys.wide, rows});
  }

  // The decays of the chunk, transposed: rows are sources j. Returns the total.
  float decays() {
    int64_t rows = at.rows();
    if constexpr (!DECAYS) {
      for (int64_t i = 0; i < rows; i++) m.reach[i] = float(x.scale);
      return 1.0f;
    }
    // As in the forward pass: products inside blocks of LANES tokens, then those of whole blocks.
    Vec since_first[CHUNK / LANES] = {};  // of each receiver of a block
    for (int64_t j = LANES - 1; j >= 0; j--)
#pragma GCC unroll 4
      for (int64_t block = 0; block < rows; block += LANES) {
        Vec& row = since_first[block / LANES];
        row = select(lane_numbers() == int32_t(j), broadcast(1.0f), row * m.gates[block + j + 1]);
        ::store(m.between + (block + j) * CHUNK + block, row);
      }
    float total = 1.0f;
    for (int64_t block = 0; block < rows; block += LANES) {
      Vec& receiver = since_first[block / LANES];
      receiver *= m.gates[block];
      ::store(m.reach + block, receiver * (total * float(x.scale)));
      total *= receiver[LANES - 1];
    }
    for (int64_t block = 0; block < rows; block += LANES) {
      const float* to_end = m.between + block * CHUNK + block + LANES - 1;
      float passed = 1.0f;
      for (int64_t later = block + LANES; later < rows; later += LANES) {
        Vec receiver = since_first[later / LANES] * passed;
        for (int64_t j = 0; j < LANES; j++) ::store(m.between + (block + j) * CHUNK + later, receiver * to_end[j * CHUNK]);
        passed *= since_first[later / LANES][LANES - 1];
      }
      for (int64_t j = 0; j < LANES; j++) m.store[block + j] = to_end[j * CHUNK] * passed;
    }
    return total;
  }

  // dS as operand, twice; dS^T = total dS^T. Returns total S.dS.
  float take_end(const Pair* start, float* d_state, float total) {
    Vec shared = zeros();
    for (int64_t c = 0; c < values.wide; c += 2)
#pragma GCC unroll 2
      for (int64_t d = 0; d < keys.wide; d += 2 * LANES) {
        Vec of[2][2];
#pragma GCC unroll 2
        for (int row = 0; row < 2; row++)
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            float* place = d_state + (c + row) * keys.wide + d + half * LANES;
            of[row][half] = load(place);
            if constexpr (DECAYS) {
              Words pairs = load_pairs(start + c / 2 * keys.wide + d + half * LANES);
              shared += of[row][half] * (row ? seconds(pairs) : firsts(pairs));
              ::store(place, of[row][half] * total);
            }
          }
        Words first = consecutive(of[0][0], of[0][1]), second = consecutive(of[1][0], of[1][1]);
        store_pairs(m.ends_by_value + c * keys.wide + d, first);
        store_pairs(m.ends_by_value + (c + 1) * keys.wide + d, second);
        store_pairs(m.ends_transposed + c / 2 * keys.wide + d, alternating<0>(first, second));
        store_pairs(m.ends_transposed + c / 2 * keys.wide + d + LANES, alternating<1>(first, second));
      }
    transpose(m.ends, values.wide, m.ends_by_value, keys.wide, values.wide, keys.wide);
    return total * sum(shared);
  }

  void pack() {
    int64_t rows = at.rows();
    transpose(m.queries_transposed, CHUNK, q.data, q.row, rows, keys.wide);
    transpose(m.d_o_columns, CHUNK, d_o.data, d_o.row, rows, values.wide);
    unpair_rows(m.d_o_transposed, CHUNK, m.d_o_columns, CHUNK, values.wide, rows);
    pair_rows(m.queries, keys.wide, q.data, q.row, rows, keys.wide);
    pair_scaled_rows(m.reached_queries, keys.wide, q.data, q.row, rows, keys.wide, m.reach);
    pair_rows(m.d_o_pairs, values.wide, d_o.data, d_o.row, rows, values.wide);
    if constexpr (!DECAYS) scale_rows(m.reached_d_o, values.wide, d_o.data, d_o.row, rows, values.wide, m.reach);
    pair_rows(m.keys, keys.wide, k.data, k.row, rows, keys.wide);
  }

  // P^T and dP^T and, in pairs, once more dP: from the products of sources j (from `row` on) with receivers i >= j.
  void weigh(int64_t row, int64_t column) {
    float scale = float(x.scale);
    for (int64_t j = row; j < row + BLOCK; j += 2)
#pragma GCC unroll 2
      for (int64_t i = column; i < column + BLOCK; i += 2 * LANES) {
        Vec p[2][2], d_p[2][2];
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++)
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            int64_t source = j + odd, from = i + half * LANES, place = (source - row) * BLOCK + from - column;
            Ints receiver = lane_numbers() + int32_t(from);
            Vec by = broadcast(scale), product = load(m.d_products + place);
            if constexpr (DECAYS) by *= load(m.between + source * CHUNK + from);
            Vec& weight = p[odd][half] = load(m.products + place) * by;
            Vec& d_weight = d_p[odd][half] = product * by;
            if (row == column) {
              weight = select(receiver < int32_t(source), zeros(), weight);
              d_weight = select(receiver < int32_t(source), zeros(), d_weight);
            }
            if constexpr (DECAYS) {
              Vec shared = weight * product;
              if (row == column) shared = select(receiver > int32_t(source), shared, zeros());
              ::store(m.received + from, load(m.received + from) + shared);
              ::store(m.sent + source * LANES, load(m.sent + source * LANES) + shared);
            }
          }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
          store_pairs(m.weights_transposed + (j + odd) * CHUNK + i, consecutive(p[odd][0], p[odd][1]));
          store_pairs(m.d_weights_transposed + (j + odd) * CHUNK + i, consecutive(d_p[odd][0], d_p[odd][1]));
          store_pairs(m.d_weights_pairs + j / 2 * CHUNK + i + odd * LANES, pairs_of(d_p[0][odd], d_p[1][odd]));
        }
      }
    transpose(m.d_weights + column * CHUNK + row, CHUNK, m.d_weights_pairs + row / 2 * CHUNK + column, CHUNK, BLOCK, BLOCK);
  }

  // block_i *= by_i; dots_i += x_i . block_i, for the channels from c on
  void fade(float* block, const float* by, float* dots, Rows of, int64_t t, int64_t c) {
    for (int64_t i = 0; i < BLOCK; i++) {
      Vec dot = zeros();
#pragma GCC unroll 8
      for (int64_t j = 0; j < BLOCK; j += LANES) {
        Vec faded = load(block + i * BLOCK + j) * by[t + i];
        dot += load(of.data + (t + i) * of.row + c + j) * faded;
        ::store(block + i * BLOCK + j, faded);
      }
      dots[t + i] += sum(dot);
    }
  }

  // One block of dQ or dK, the gradient of `of`: what comes through the state, which fades, and what from the chunk.
  void gradient(const Tensor& to, int64_t t, int64_t c, Product far, Product near, const float* by, float* dots, Rows of) {
    if constexpr (DECAYS) {
      multiply(m.products, BLOCK, BLOCK, BLOCK, far);
      fade(m.products, by, dots, of, t, c);
      multiply<Into::result>(m.products, BLOCK, BLOCK, BLOCK, near);
    } else {
      multiply(m.products, BLOCK, BLOCK, BLOCK, far, near);
    }
    write_block(to, at, head, keys, t, c, m.products, 1.0f);
  }

  void gradients(const Pair* start) {
    int64_t rows = at.rows();
    Rows reached = DECAYS ? d_o : Rows{m.reached_d_o, values.wide}, stored = DECAYS ? Rows{m.stored_keys, keys.wide} : k;
    for (int64_t t = 0; t < rows; t += BLOCK) {
      for (int64_t c = 0; c < keys.wide; c += BLOCK) {
        gradient(x.d_q, t, c, {reached.data + t * reached.row, reached.row, start + c, keys.wide, values.wide},
                 {m.d_weights + t * CHUNK, CHUNK, m.keys + c, keys.wide, t + BLOCK}, m.reach, m.reached, q);
        gradient(x.d_k, t, c, {v.data + t * v.row, v.row, m.ends_transposed + c, keys.wide, values.wide},
                 {m.d_weights_transposed + t * CHUNK + t, CHUNK, m.queries + t / 2 * keys.wide + c, keys.wide, rows - t},
                 m.store, m.stored, k);
      }
      for (int64_t c = 0; c < values.wide; c += BLOCK) {
        Product far{stored.data + t * stored.row, stored.row, m.ends + c, values.wide, keys.wide};
        Product near{m.weights_transposed + t * CHUNK + t, CHUNK, m.d_o_pairs + t / 2 * values.wide + c, values.wide, rows - t};
        multiply(m.products, BLOCK, BLOCK, BLOCK, far, near);
        write_block(x.d_v, at, head, values, t, c, m.products, 1.0f);
      }
    }
  }

  // dg from its four parts; a closed gate has none.
  void write_d_log_decay(int64_t n, float through_all) {
    float stored_before[CHUNK], before = through_all;
    for (int64_t t = 0; t < at.count; t++) {
      stored_before[t] = before;
      before += m.stored[t];
    }
    float after = 0.0f, total = 0.0f;
    for (int64_t t = at.count - 1; t >= 0; t--) {
      float sent = sum(load(m.sent + t * LANES));
      after += m.received[t] + m.reached[t] - sent;
      float gradient = m.gates[t] == 0.0f ? 0.0f : after + stored_before[t];
      total += gradient;
      if (!x.decay_of_head) *x.d_log_decay.at<float>(at.row, at.first + t, head) = gradient;
    }
    if (x.decay_of_head) *x.d_log_decay.at<float>(n, head) += total;
  }

  void chunk(Span span, int64_t n, const Pair* start, float* d_state) {
    take(span);
    q = rows_of(x.q, at, head / x.sharing, keys, m.q);
    d_o = rows_of(x.d_o, at, head, values, m.d_o);
    int64_t rows = at.rows();
    float total = decays();
    float through_all = take_end(start, d_state, total);
    pack();
    if constexpr (DECAYS) {
      scale_rows(m.stored_keys, keys.wide, k.data, k.row, rows, keys.wide, m.store);
      for (float* sums : {m.received, m.reached, m.stored}) std::memset(sums, 0, CHUNK * sizeof *sums);
      std::memset(m.sent, 0, CHUNK * LANES * sizeof *m.sent);
    }
    for (int64_t j = 0; j < rows; j += BLOCK)
      for (int64_t i = j; i < rows; i += BLOCK) {
        multiply(m.products, BLOCK, BLOCK, BLOCK,
                 Product{k.data + j * k.row, k.row, m.queries_transposed + i, CHUNK, keys.wide});
        multiply(m.d_products, BLOCK, BLOCK, BLOCK,
                 Product{v.data + j * v.row, v.row, m.d_o_columns + i, CHUNK, values.wide});
        weigh(j, i);
      }
    gradients(start);
    multiply<Into::result>(d_state, keys.wide, values.wide, keys.wide,
                           Product{m.d_o_transposed, CHUNK, m.reached_queries, keys.wide, rows});
    if constexpr (DECAYS) write_d_log_decay(n, through_all);
  }

 public:
  Head(const Backward& x, const Memory& m, int64_t head) : x(x), m(m), head(head), keys(x.keys), values(x.values) {}

  // The tokens of one group, from the state that was saved before them; `d_state` is dS^T.
  void group(Sequence s, int64_t n, int64_t first, const float* saved, float* d_state) {
    int64_t stop = std::min(first + GROUP, s.stop), of_state = keys.wide * values.wide / 2;
    transpose(m.state, keys.wide, saved, values.wide, keys.wide, values.wide);
    for (int64_t t = first; t < stop; t += CHUNK) {
      pair_rows(m.starts + (t - first) / CHUNK * of_state, keys.wide, m.state, keys.wide, values.wide, keys.wide);
      if (t + CHUNK >= stop) break;
      take({s.row, t, CHUNK});
      advance();
    }
    for (int64_t t = first + (stop - first - 1) / CHUNK * CHUNK; t >= first; t -= CHUNK)
      chunk({s.row, t, std::min(CHUNK, stop - t)}, n, m.starts + (t - first) / CHUNK * of_state, d_state);
  }
};

template <bool DECAYS>
void run_heads(const Backward& x, int64_t n, int64_t head, int64_t count) {
  Channels keys(x.keys), values(x.values);
  Measure measure;
  Memory(measure, keys.wide, values.wide);
  Scratch scratch(measure.bytes);
  Memory memory(scratch, keys.wide, values.wide);
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  Groups groups = groups_of(x.cu_seqlens, n, x.length, s);
  int64_t size = keys.wide * values.wide;
  for (int64_t h = 0; h < count; h++) {
    read_state(memory.state, x.d_last, n, head + h, keys, values);
    transpose(memory.d_states + h * size, keys.wide, memory.state, values.wide, keys.wide, values.wide);
    if (x.decay_of_head) *x.d_log_decay.at<float>(n, head + h) = 0.0f;
  }
  for (int64_t g = groups.count - 1; g >= 0; g--)
    for (int64_t h = 0; h < count; h++)
      Head<DECAYS>(x, memory, head + h)
          .group(s, n, s.start + g * GROUP, x.saved.at<float>(groups.first + g, head + h), memory.d_states + h * size);
  for (int64_t h = 0; h < count; h++) {
    transpose(memory.state, values.wide, memory.d_states + h * size, keys.wide, values.wide, keys.wide);
    write_state(x.d_state, n, head + h, memory.state, keys, values);
  }
}

}  // namespace
}  // namespace linear_attention_bf16

KERNEL(linear_attention_bf16_backward, linear_attention_bf16::Backward) {
  using namespace linear_attention_bf16;
  for_heads(arguments.sequences, arguments.heads, [&](int64_t n, int64_t head, int64_t count) {
    arguments.log_decay ? run_heads<true>(arguments, n, head, count) : run_heads<false>(arguments, n, head, count);
  });
}

// Linear attention in bfloat16, backward: products of bfloat16 numbers, sums and states in float32.
//
// With P, D = scale * between and the first state S as in the forward pass, dS the gradient of the chunk's last state:
//
//     P^T = (K Q^T) * D^T                     dP^T = (V dO^T) * D^T                       upper triangles
//     dQ = [scale reach dO | dP] [S^T ; K]    dK = [store V | dP^T] [dS^T ; Q]    dV = [store K | P^T] [dS ; dO]
//     dS^T = total dS^T + dO^T (scale reach Q)
//
// A gate stands in every product of a later token i with an earlier one j, so with `a` for the part from the state
//
//     dg_t = sum over i >= t > j of P_ij dO_i.v_j + over i >= t of q_i.dQ_i(a) + over j < t of k_j.dK_j(a) + total S.dS
//
// States are kept transposed here, for two of three products read them so. Those inside a group are made once more from
// the one that was saved before it.
#include "linear_attention_bf16.h"

namespace linear_attention_bf16 {
namespace {

struct Backward {
  Tensor q, k, v, log_decay, cu_seqlens, saved, d_o, d_last;  // as in the forward pass
  Tensor d_q, d_k, d_v, d_log_decay, d_state;  // [B, T, H, K] twice, [B, T, H, V], [B, T, H], [N, H, K, V]
  Tensor ends;  // where there are few sequences and heads, room for dS^T after the groups: [groups, H, wide V, wide K]
  int64_t sequences, length, heads, keys, values, sharing, slots, few;
  int64_t decay_of_head;  // d_log_decay is [groups, H]: the sum over a group's tokens
  double scale;
};

// What is used in turns stands in the same place: the smaller it all is, the nearer the cache.
struct Memory {
  bfloat16 *q, *k, *v, *d_o;  // copies of tokens at an end
  float *gates, *reach, *store, *received;  // of tokens
  float *balance, *stored;  // of tokens, LANES parts of each sum
  float* between;  // [C][C]
  Pair *columns_of_q, *columns_of_d_o;  // Q^T and dO^T in pairs: [K / 2][C], [V / 2][C]
  float *products, *d_products;  // [BLOCK][BLOCK]
  bfloat16 *weights_transposed, *d_weights_transposed, *d_weights;  // P^T, dP^T, dP: [C][C]
  Pair* d_weights_pairs;  // dP^T's block in pairs
  bfloat16* rows;  // one of the operands A, [C][K] or [C][V] or [V][C]
  Pair* pairs;  // one of the operands B, [C / 2][K] or [C / 2][V]
  Pair* starts;  // S^T in pairs, [V / 2][K], of each chunk of a group
  bfloat16* end;  // dS^T: [V][K]
  Pair *end_transposed_pairs, *end_pairs;  // dS^T and dS in pairs: [V / 2][K], [K / 2][V]
  float *state, *states;  // S^T; dS^T of each of HEADS heads

  template <class From>
  Memory(From& from, int64_t wide_keys, int64_t wide_values) {
    int64_t of_keys = CHUNK * wide_keys, of_values = CHUNK * wide_values, of_state = wide_keys * wide_values;
    for (bfloat16** x : {&q, &k}) *x = from.template take<bfloat16>(of_keys);
    for (bfloat16** x : {&v, &d_o}) *x = from.template take<bfloat16>(of_values);
    for (float** x : {&gates, &reach, &store, &received}) *x = from.take(CHUNK + 1);
    for (float** x : {&balance, &stored}) *x = from.take(CHUNK * LANES);
    between = from.take(CHUNK * CHUNK);
    columns_of_q = from.template take<Pair>(of_keys / 2);
    columns_of_d_o = from.template take<Pair>(of_values / 2);
    for (float** x : {&products, &d_products}) *x = from.take(BLOCK * BLOCK);
    for (bfloat16** x : {&weights_transposed, &d_weights_transposed, &d_weights})
      *x = from.template take<bfloat16>(CHUNK * CHUNK);
    d_weights_pairs = from.template take<Pair>(BLOCK / 2 * BLOCK);
    rows = from.template take<bfloat16>(std::max(of_keys, of_values));
    pairs = from.template take<Pair>(std::max(of_keys, of_values) / 2);
    starts = from.template take<Pair>(GROUP / CHUNK * of_state / 2);
    end = from.template take<bfloat16>(of_state);
    for (Pair** x : {&end_transposed_pairs, &end_pairs}) *x = from.template take<Pair>(of_state / 2);
    state = from.take(of_state);
    states = from.take(HEADS * of_state);
  }
};

// One head of one sequence.
template <bool DECAYS>
class Head {
  const Backward& x;
  const Memory& m;
  int64_t head;
  Channels keys, values;
  Ahead ahead{0, 1};
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
    transpose(m.columns_of_d_o, CHUNK, v.data, v.row, rows, values.wide);
    unpair_rows(m.rows, CHUNK, m.columns_of_d_o, CHUNK, values.wide, rows);
    if constexpr (DECAYS) {
      float product = 1.0f;
      for (int64_t j = rows - 1; j >= 0; j--) {
        m.store[j] = product;
        product *= m.gates[j];
      }
      pair_scaled_rows(m.pairs, keys.wide, k.data, k.row, rows, keys.wide, m.store);
      for (int64_t i = 0; i < size; i += LANES) ::store(m.state + i, load(m.state + i) * product);
    } else {
      pair_rows(m.pairs, keys.wide, k.data, k.row, rows, keys.wide);
    }
    multiply<Into::result>(m.state, keys.wide, values.wide, keys.wide,
                           Product{m.rows, CHUNK, m.pairs, keys.wide, rows});
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
        for (int64_t j = 0; j < LANES; j++)
          ::store(m.between + (block + j) * CHUNK + later, receiver * to_end[j * CHUNK]);
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
        store_pairs(m.end + c * keys.wide + d, first);
        store_pairs(m.end + (c + 1) * keys.wide + d, second);
        store_pairs(m.end_transposed_pairs + c / 2 * keys.wide + d, alternating<0>(first, second));
        store_pairs(m.end_transposed_pairs + c / 2 * keys.wide + d + LANES, alternating<1>(first, second));
      }
    transpose(m.end_pairs, values.wide, m.end, keys.wide, values.wide, keys.wide);
    return total * sum(shared);
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
              ::store(m.balance + source * LANES, load(m.balance + source * LANES) - shared);
            }
          }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
          store_pairs(m.weights_transposed + (j + odd) * CHUNK + i, consecutive(p[odd][0], p[odd][1]));
          store_pairs(m.d_weights_transposed + (j + odd) * CHUNK + i, consecutive(d_p[odd][0], d_p[odd][1]));
          Pair* pairs = m.d_weights_pairs + (j - row) / 2 * BLOCK + i - column;
          store_pairs(pairs + odd * LANES, pairs_of(d_p[0][odd], d_p[1][odd]));
        }
      }
    transpose(m.d_weights + column * CHUNK + row, CHUNK, m.d_weights_pairs, BLOCK, BLOCK, BLOCK);
  }

  // block_i *= by_i; dots_i += the parts of x_i . block_i, for the channels from c on
  void fade(float* block, const float* by, float* dots, Rows of, int64_t t, int64_t c) {
    for (int64_t i = 0; i < BLOCK; i++) {
      Vec dot = load(dots + (t + i) * LANES);
#pragma GCC unroll 8
      for (int64_t j = 0; j < BLOCK; j += LANES) {
        Vec faded = load(block + i * BLOCK + j) * by[t + i];
        dot += load(of.data + (t + i) * of.row + c + j) * faded;
        ::store(block + i * BLOCK + j, faded);
      }
      ::store(dots + (t + i) * LANES, dot);
    }
  }

  // One block of dQ or dK, the gradient of `of`: what comes through the state, which fades, and what from the chunk.
  void gradient(const Tensor& to, int64_t t, int64_t c, Product far, Product near, const float* by, float* dots,
                Rows of) {
    if constexpr (DECAYS) {
      multiply(m.products, BLOCK, BLOCK, BLOCK, far);
      fade(m.products, by, dots, of, t, c);
      multiply<Into::result>(m.products, BLOCK, BLOCK, BLOCK, near);
    } else {
      multiply(m.products, BLOCK, BLOCK, BLOCK, far, near);
    }
    ahead.fetch();
    write_block(to, at, head, keys, t, c, m.products, 1.0f);
  }

  void d_queries(const Pair* start) {
    Rows from = d_o;
    if constexpr (!DECAYS) {
      scale_rows(m.rows, values.wide, d_o.data, d_o.row, at.rows(), values.wide, m.reach);
      from = {m.rows, values.wide};
    }
    pair_rows(m.pairs, keys.wide, k.data, k.row, at.rows(), keys.wide);
    for (int64_t t = 0; t < at.rows(); t += BLOCK)
      for (int64_t c = 0; c < keys.wide; c += BLOCK) {
        Product far{from.data + t * from.row, from.row, start + c, keys.wide, values.wide};
        Product near{m.d_weights + t * CHUNK, CHUNK, m.pairs + c, keys.wide, t + BLOCK};
        gradient(x.d_q, t, c, far, near, m.reach, m.balance, q);
      }
  }

  void d_keys() {
    pair_rows(m.pairs, keys.wide, q.data, q.row, at.rows(), keys.wide);
    for (int64_t t = 0; t < at.rows(); t += BLOCK)
      for (int64_t c = 0; c < keys.wide; c += BLOCK) {
        Product far{v.data + t * v.row, v.row, m.end_transposed_pairs + c, keys.wide, values.wide};
        Product near{m.d_weights_transposed + t * CHUNK + t, CHUNK, m.pairs + t / 2 * keys.wide + c, keys.wide,
                     at.rows() - t};
        gradient(x.d_k, t, c, far, near, m.store, m.stored, k);
      }
  }

  void d_values() {
    Rows from = k;
    if constexpr (DECAYS) {
      scale_rows(m.rows, keys.wide, k.data, k.row, at.rows(), keys.wide, m.store);
      from = {m.rows, keys.wide};
    }
    pair_rows(m.pairs, values.wide, d_o.data, d_o.row, at.rows(), values.wide);
    for (int64_t t = 0; t < at.rows(); t += BLOCK)
      for (int64_t c = 0; c < values.wide; c += BLOCK) {
        Product far{from.data + t * from.row, from.row, m.end_pairs + c, values.wide, keys.wide};
        Product near{m.weights_transposed + t * CHUNK + t, CHUNK, m.pairs + t / 2 * values.wide + c, values.wide,
                     at.rows() - t};
        multiply(m.products, BLOCK, BLOCK, BLOCK, far, near);
        ahead.fetch();
        write_block(x.d_v, at, head, values, t, c, m.products, 1.0f);
      }
  }

  // dS^T += dO^T (reach Q); take_end has multiplied it by the total.
  void d_start(float* d_state) {
    unpair_rows(m.rows, CHUNK, m.columns_of_d_o, CHUNK, values.wide, at.rows());
    pair_scaled_rows(m.pairs, keys.wide, q.data, q.row, at.rows(), keys.wide, m.reach);
    Product update{m.rows, CHUNK, m.pairs, keys.wide, at.rows()};
    multiply<Into::result>(d_state, keys.wide, values.wide, keys.wide, update);
  }

  // dg from its four parts; a closed gate has none.
  void write_d_log_decay(int64_t slot, float through_all) {
    float stored_before[CHUNK], before = through_all;
    for (int64_t t = 0; t < at.count; t++) {
      stored_before[t] = before;
      before += sum(load(m.stored + t * LANES));
    }
    float after = 0.0f, total = 0.0f;
    for (int64_t t = at.count - 1; t >= 0; t--) {
      after += m.received[t] + sum(load(m.balance + t * LANES));
      float gradient = m.gates[t] == 0.0f ? 0.0f : after + stored_before[t];
      total += gradient;
      if (!x.decay_of_head) *x.d_log_decay.at<float>(at.row, at.first + t, head) = gradient;
    }
    if (x.decay_of_head) *x.d_log_decay.at<float>(slot, head) += total;
  }

  // What comes next: queries and d_o of the chunk before, keys and values of the next group.
  void fetch_ahead(Span span, Sequence s, int64_t first, int64_t next_first, int64_t next_head) {
    ahead = Ahead(span.count, 6 + (2 * keys.wide + values.wide) / BLOCK * 2);
    Span later{s.row, next_first + span.first - first, CHUNK}, before{s.row, span.first - CHUNK, CHUNK};
    int64_t of = head;
    if (span.first == first) {
      before.first = next_first + (std::min(GROUP, s.stop - next_first) - 1) / CHUNK * CHUNK;
      of = next_head;
    }
    if (next_first >= s.start || span.first > first) {
      ahead.add(x.q, before, of / x.sharing, keys);
      ahead.add(x.d_o, before, of, values);
    }
    if (next_first >= s.start) {
      ahead.add(x.k, later, next_head / x.sharing, keys);
      ahead.add(x.v, later, next_head, values);
    }
  }

  void chunk(Span span, int64_t slot, const Pair* start, float* d_state) {
    take(span);
    q = rows_of(x.q, at, head / x.sharing, keys, m.q);
    d_o = rows_of(x.d_o, at, head, values, m.d_o);
    int64_t rows = at.rows();
    float total = decays();
    if constexpr (DECAYS) {
      std::memset(m.received, 0, CHUNK * sizeof *m.received);
      for (float* parts : {m.balance, m.stored}) std::memset(parts, 0, CHUNK * LANES * sizeof *parts);
    }
    transpose(m.columns_of_q, CHUNK, q.data, q.row, rows, keys.wide);
    transpose(m.columns_of_d_o, CHUNK, d_o.data, d_o.row, rows, values.wide);
    for (int64_t j = 0; j < rows; j += BLOCK)
      for (int64_t i = j; i < rows; i += BLOCK) {
        Product weights{k.data + j * k.row, k.row, m.columns_of_q + i, CHUNK, keys.wide};
        Product d_weights{v.data + j * v.row, v.row, m.columns_of_d_o + i, CHUNK, values.wide};
        multiply(m.products, BLOCK, BLOCK, BLOCK, weights);
        ahead.fetch();
        multiply(m.d_products, BLOCK, BLOCK, BLOCK, d_weights);
        ahead.fetch();
        weigh(j, i);
      }
    d_queries(start);
    float through_all = take_end(start, d_state, total);
    d_keys();
    d_values();
    d_start(d_state);
    if constexpr (DECAYS) write_d_log_decay(slot, through_all);
  }

 public:
  Head(const Backward& x, const Memory& m, int64_t head) : x(x), m(m), head(head), keys(x.keys), values(x.values) {}

  // The tokens of one group, whose state is saved in `slot`; `d_state` is dS^T. The next group to come is that of
  // `next_head` from `next_first` on.
  void group(Sequence s, int64_t first, int64_t slot, float* d_state, int64_t next_first, int64_t next_head) {
    int64_t stop = std::min(first + GROUP, s.stop), of_state = keys.wide * values.wide / 2;
    if (x.decay_of_head) *x.d_log_decay.at<float>(slot, head) = 0.0f;
    transpose(m.state, keys.wide, x.saved.at<float>(slot, head), values.wide, keys.wide, values.wide);
    for (int64_t t = first; t < stop; t += CHUNK) {
      pair_rows(m.starts + (t - first) / CHUNK * of_state, keys.wide, m.state, keys.wide, values.wide, keys.wide);
      if (t + CHUNK >= stop) break;
      take({s.row, t, CHUNK});
      advance();
    }
    for (int64_t t = first + (stop - first - 1) / CHUNK * CHUNK; t >= first; t -= CHUNK) {
      Span span{s.row, t, std::min(CHUNK, stop - t)};
      fetch_ahead(span, s, first, next_first, next_head);
      chunk(span, slot, m.starts + (t - first) / CHUNK * of_state, d_state);
    }
  }

  // dS^T before a chunk from that after it, as in `chunk`, BLOCK of its rows from `first_value` on.
  void retreat(Span span, int64_t first_value, float* d_state) {
    take(span);
    q = rows_of(x.q, at, head / x.sharing, keys, m.q);
    d_o = rows_of(x.d_o, at, head, values, m.d_o);
    float total = decays();
    if constexpr (DECAYS)
      for (int64_t i = 0; i < BLOCK * keys.wide; i += LANES) ::store(d_state + i, load(d_state + i) * total);
    transpose(m.columns_of_d_o, CHUNK, d_o.data + first_value, d_o.row, at.rows(), BLOCK);
    unpair_rows(m.rows, CHUNK, m.columns_of_d_o, CHUNK, BLOCK, at.rows());
    pair_scaled_rows(m.pairs, keys.wide, q.data, q.row, at.rows(), keys.wide, m.reach);
    multiply<Into::result>(d_state, keys.wide, BLOCK, keys.wide, Product{m.rows, CHUNK, m.pairs, keys.wide, at.rows()});
  }
};

// dS^T after the last token.
INLINE void read_end(float* d_state, const Backward& x, const Work<Memory>& work, int64_t n, int64_t head) {
  read_state(work.memory.state, x.d_last, n, head, work.keys, work.values);
  transpose(d_state, work.keys.wide, work.memory.state, work.values.wide, work.keys.wide, work.values.wide);
}

template <bool DECAYS>
void run_heads(const Backward& x, int64_t n, int64_t head, int64_t count) {
  Work<Memory> work(x.keys, x.values);
  const Memory& m = work.memory;
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  Groups groups = groups_of(x.cu_seqlens, n, x.length, s);
  for (int64_t h = 0; h < count; h++) read_end(m.states + h * work.size(), x, work, n, head + h);
  for (int64_t g = groups.count - 1; g >= 0; g--)
    for (int64_t h = 0; h < count; h++) {
      int64_t first = s.start + g * GROUP, next_head = (h + 1) % count;
      Head<DECAYS>(x, m, head + h)
          .group(s, first, groups.first + g, m.states + h * work.size(), next_head ? first : first - GROUP,
                 head + next_head);
    }
  for (int64_t h = 0; h < count; h++) {
    transpose(m.state, work.values.wide, m.states + h * work.size(), work.keys.wide, work.values.wide, work.keys.wide);
    write_state(x.d_state, n, head + h, m.state, work.keys, work.values);
  }
}

// Keeps dS^T after each group, BLOCK of its rows, and writes it before the first token.
template <bool DECAYS>
void run_ends(const Backward& x, int64_t n, int64_t head, int64_t first_value) {
  Work<Memory> work(x.keys, x.values);
  Sequence s = sequence_of(x.cu_seqlens, n, x.length);
  Groups groups = groups_of(x.cu_seqlens, n, x.length, s);
  Head<DECAYS> here(x, work.memory, head);
  read_end(work.memory.states, x, work, n, head);
  float* d_state = work.memory.states + first_value * work.keys.wide;
  for (int64_t g = groups.count - 1; g >= 0; g--) {
    int64_t first = s.start + g * GROUP, stop = std::min(first + GROUP, s.stop);
    float* kept = x.ends.at<float>(groups.first + g, head, first_value);
    std::memcpy(kept, d_state, BLOCK * work.keys.wide * sizeof *kept);
    for (int64_t t = first + (stop - first - 1) / CHUNK * CHUNK; t >= first; t -= CHUNK)
      here.retreat({s.row, t, std::min(CHUNK, stop - t)}, first_value, d_state);
  }
  int64_t count = std::min(BLOCK, x.values - first_value);
  for (int64_t d = 0; d < x.keys; d++)
    for (int64_t c = 0; c < count; c++)
      *x.d_state.at<float>(n, head, d, first_value + c) = d_state[c * work.keys.wide + d];
}

template <bool DECAYS>
void run_group(const Backward& x, Sequence s, int64_t first, int64_t slot, int64_t head) {
  Work<Memory> work(x.keys, x.values);
  float* d_state = work.memory.states;
  std::memcpy(d_state, x.ends.at<float>(slot, head), work.size() * sizeof *d_state);
  Head<DECAYS>(x, work.memory, head).group(s, first, slot, d_state, s.start - GROUP, head);
}

// Few sequences and heads: first dS^T after the groups, by blocks of values, then the groups side by side.
template <bool DECAYS>
void run(const Backward& x) {
  if (!x.few)
    return for_heads(x.sequences, x.heads,
                     [&](int64_t n, int64_t head, int64_t count) { run_heads<DECAYS>(x, n, head, count); });
  for_blocks_of_values(x.sequences, x.heads, Channels(x.values),
                       [&](int64_t n, int64_t head, int64_t value) { run_ends<DECAYS>(x, n, head, value); });
  for_groups(x.cu_seqlens, x.sequences, x.length, x.slots, x.heads,
             [&](int64_t, Sequence s, int64_t first, int64_t slot, int64_t head) {
               run_group<DECAYS>(x, s, first, slot, head);
             });
}

}  // namespace
}  // namespace linear_attention_bf16

KERNEL(linear_attention_bf16_backward, linear_attention_bf16::Backward) {
  using namespace linear_attention_bf16;
  arguments.log_decay ? run<true>(arguments) : run<false>(arguments);
}

// Mamba's scan: N states for each channel d, where step = dt + dt_bias, or the softplus of that,
//
//     h_t[n] = e^{step_t A[n]} h_{t-1}[n] + step_t u_t B_t[n]        y_t = (sum_n C_t[n] h_t[n] + D u_t) silu(z_t)
//
// and its gradients: with g_t that of the sum, d_t[n] = g_t C_t[n] + e^{step_{t+1} A[n]} d_{t+1}[n] is that of h_t[n],
// and
//
//     of the input step_t u_t   sum_n d_t[n] B_t[n]              of B_t[n]    sum over channels of d_t[n] step_t u_t
//     of the exponent step A    d_t[n] e^{step_t A[n]} h_{t-1}[n] = e_t[n]    of C_t[n]    sum over channels of g_t
//     h_t[n] of step_t (its decay)     sum_n e_t[n] A[n]                of A[n]      sum over t of e_t[n] step_t
//
// A block is LANES channels: one vector for each state. Time passes in pieces of STEPS tokens, inside which all blocks
// of a range take their turn: what they share stays in the cache. The forward pass keeps the states before every `kept`
// tokens, some pieces, from which the backward pass computes those between again. B's and C's gradients are summed over
// the channels of a group, then over the groups: their number depends on nothing but D.
#include "arguments.h"
#include "channels.h"

namespace {

constexpr int STEPS = 16;           // of a piece; Python knows this number too
constexpr int AT_ONCE = 8;          // states in registers
constexpr int64_t WIDEST = 1024;    // channels of a range
constexpr int64_t PIECE = STEPS * LANES;
constexpr float LN2 = 0.69314718055994531f;

struct Forward {
  Tensor u, dt, A, B, C, D, z,
      dt_bias;               // [B, T, D] twice, [D, N], [B, T, N] twice, [D] or none, as u or none, [D] or none
  Tensor state, cu_seqlens;  // [S, D, N]; [S + 1] or none
  Tensor y, last, before;    // before: the states that are kept, [pieces, blocks, N, LANES], or none
  int64_t sequences, length, channels, states, kept, softplus;

  bool is_large() const { return (cu_seqlens ? 1 : sequences) * length * channels >= LARGE; }
};

struct Backward {
  Tensor u, dt, A, B, C, D, z, dt_bias, before, cu_seqlens, d_y, d_last;
  Tensor d_u, d_dt, d_A, d_B, d_C, d_D, d_z, d_dt_bias, d_state;
  Tensor by_group;     // what B and C receive from each group of channels, [groups, B T, 2 N]
  Tensor by_sequence;  // what A, D and dt_bias receive from each sequence, [S, blocks, N + 2, LANES]
  int64_t sequences, length, channels, states, kept, softplus, group;

  bool is_large() const { return (cu_seqlens ? 1 : sequences) * length * channels >= LARGE; }
};

// A block of a [D, N] tensor: a vector of channels for each state. Where there are fewer than LANES channels, zeros.
INLINE void read_block(float* to, const Tensor& from, int64_t n, int64_t channel, int64_t count, int64_t states) {
  bool plain = from.type == Type::float32 && from.stride[2] == 1;
  for (int64_t first = 0; first < states; first += LANES) {
    int64_t some = std::min<int64_t>(LANES, states - first);
    Vec rows[LANES];
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; i++) {
      alignas(64) float row[LANES] = {};
      if (i < count) {
        if (plain) {
          rows[i] = load_some(from.at<float>(n, channel + i, first), some);
          continue;
        }
        read(row, from, n * from.stride[0] + (channel + i) * from.stride[1] + first * from.stride[2], some,
             from.stride[2]);
      }
      rows[i] = load(row);
    }
    transpose(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; i++)
      if (i < some) store(to + (first + i) * LANES, rows[i]);
  }
}
INLINE void write_block(const Tensor& to, int64_t n, int64_t channel, int64_t count, int64_t states,
                        const float* from) {
  for (int64_t first = 0; first < states; first += LANES) {
    int64_t some = std::min<int64_t>(LANES, states - first);
    Vec rows[LANES];
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; i++) rows[i] = i < some ? load(from + (first + i) * LANES) : zeros();
    transpose(rows);
    for (int64_t i = 0; i < count; i++) {
      alignas(64) float row[LANES];
      store(row, rows[i]);
      write(to, n * to.stride[0] + (channel + i) * to.stride[1] + first * to.stride[2], row, some, to.stride[2]);
    }
  }
}

// LANES channels of the tokens from t on, of a [B, T, D] tensor. Rows lie far apart, which no processor foresees: so
// those of the piece that comes next, `ahead` tokens from here, are asked for at the same time.
INLINE void read_tokens(float* to, const Tensor& from, int64_t row, int64_t t, int64_t channel, int64_t steps,
                        int64_t count, int64_t ahead) {
  with_type(from, [&](auto number) {
    auto* data = from.at<decltype(number)>(row, t, channel);
    int64_t stride = from.stride[1];
    for (int64_t i = 0; i < steps; i++) {
      __builtin_prefetch(data + (i + ahead) * stride, 0, 2);
      store(to + i * LANES, load_some(data + i * stride, count));
    }
  });
}
INLINE void write_tokens(const Tensor& to, int64_t row, int64_t t, int64_t channel, int64_t steps, int64_t count,
                         const float* from, bool large) {
  with_type(to, [&](auto number) {
    auto* data = to.at<decltype(number)>(row, t, channel);
    bool past =
        large && count >= LANES && reinterpret_cast<uintptr_t>(data) % sizeof(Vec) == 0 && to.stride[1] % LANES == 0;
    for (int64_t i = 0; i < steps; i++) {
      Vec x = load(from + i * LANES);
      past ? stream(data + i * to.stride[1], x) : store_some(data + i * to.stride[1], x, count);
    }
  });
}
// A [D, N] tensor as one of [1, D, N].
INLINE Tensor alone(const Tensor& x) { return {x.data, x.type, {0, x.stride[0], x.stride[1], 0}}; }

// What belongs to a block for the whole call.
struct Constants {
  const float *decay, *skip, *bias;  // A log2(e) for each state, D, dt_bias
  static int64_t size(int64_t states) { return (states + 2) * LANES; }
  Constants(const float* data, int64_t states)
      : decay(data), skip(data + states * LANES), bias(data + (states + 1) * LANES) {}
  template <class Arguments>
  static void read(float* to, const Arguments& x, int64_t channel, int64_t count) {
    float *skip = to + x.states * LANES, *bias = skip + LANES;
    std::fill_n(skip, 2 * LANES, 0.0f);
    read_block(to, alone(x.A), 0, channel, count, x.states);
    for (int64_t i = 0; i < x.states; i++) store(to + i * LANES, load(to + i * LANES) * LOG2E);
    if (x.D) ::read(skip, x.D, channel * x.D.stride[0], count, x.D.stride[0]);
    if (x.dt_bias) ::read(bias, x.dt_bias, channel * x.dt_bias.stride[0], count, x.dt_bias.stride[0]);
  }
};

// Some channels of one sequence: a unit of work.
template <class Arguments>
struct Unit {
  const Arguments& x;
  Sequence s;
  int64_t n, channel, count, states;
  float *constants, *B, *C;

  static int64_t blocks(int64_t count) { return (count + LANES - 1) / LANES; }
  static int64_t size(const Arguments& x, int64_t count) {
    return blocks(count) * Constants::size(x.states) + 2 * STEPS * (x.states + LANES);
  }
  Unit(const Arguments& x, Scratch& scratch, int64_t n, int64_t channel, int64_t count)
      : x(x), s(sequence_of(x.cu_seqlens, n, x.length)), n(n), channel(channel), count(count), states(x.states) {
    constants = scratch.take(blocks(count) * Constants::size(states));
    B = scratch.take(STEPS * (states + LANES));
    C = scratch.take(STEPS * (states + LANES));
    for_blocks([&](int64_t k, int64_t at, int64_t some) {
      Constants::read(constants + k * Constants::size(states), x, at, some);
    });
  }
  // visit(number, first channel, channels) for all blocks.
  template <class Visit>
  INLINE void for_blocks(Visit visit) const {
    for (int64_t k = 0; k < blocks(count); k++)
      visit(k, channel + k * LANES, std::min<int64_t>(LANES, count - k * LANES));
  }
  Constants constant(int64_t k) const { return {constants + k * Constants::size(states), states}; }
  int64_t steps(int64_t t) const { return std::min<int64_t>(STEPS, s.stop - t); }
  void read_projections(int64_t t) {
    for (int64_t i = 0; i < steps(t); i++) {
      auto row = [&](const Tensor& from) { return s.row * from.stride[0] + (t + i) * from.stride[1]; };
      read(B + i * states, x.B, row(x.B), states, x.B.stride[2]);
      read(C + i * states, x.C, row(x.C), states, x.C.stride[2]);
    }
  }
  // Where the states before token t are kept, for the block of a channel.
  float* kept(int64_t t, int64_t at) const {
    int64_t first = x.cu_seqlens ? s.start / x.kept + n : n * ((x.length + x.kept - 1) / x.kept);
    int64_t place = (first + (t - s.start) / x.kept) * blocks(x.channels) + at / LANES;
    return x.before.template at<float>(place * states * LANES);
  }
};

// visit.operator()<COUNT>(first) for groups of states that cover `states`: as many as fit the registers, then halves.
template <int COUNT = AT_ONCE, class Visit>
INLINE void for_states(int64_t states, Visit visit, int64_t first = 0) {
  for (; first + COUNT <= states; first += COUNT) visit.template operator()<COUNT>(first);
  if constexpr (COUNT > 1) for_states<COUNT / 2>(states, visit, first);
}

// COUNT states of a block through a piece: h = e^{step A} h + input B, sum += C h.
template <int COUNT>
void advance(float* states, const float* decay, const float* B, const float* C, int64_t projections, const float* step,
             const float* input, float* sum, int64_t steps) {
  Vec h[COUNT];
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; i++) h[i] = load(states + i * LANES);
  for (int64_t t = 0; t < steps; t++) {
    Vec dt = load(step + t * LANES), in = load(input + t * LANES);
    Vec even = load(sum + t * LANES), odd = zeros();
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++) {
      h[i] = exp2(dt * load(decay + i * LANES)) * h[i] + in * B[t * projections + i];
      (i % 2 ? odd : even) += h[i] * C[t * projections + i];
    }
    store(sum + t * LANES, even + odd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; i++) store(states + i * LANES, h[i]);
}

// Reads a piece of a block: its step sizes, its inputs to the states, and the sums' share of D.
template <class Arguments>
void prepare(const Unit<Arguments>& unit, int64_t k, int64_t t, int64_t at, int64_t some, float* step, float* input,
             float* sum) {
  const Arguments& x = unit.x;
  Constants constant = unit.constant(k);
  read_tokens(input, x.u, unit.s.row, t, at, unit.steps(t), some, STEPS);
  read_tokens(step, x.dt, unit.s.row, t, at, unit.steps(t), some, STEPS);
  Vec bias = load(constant.bias), skip = load(constant.skip);
  for (int64_t i = 0; i < unit.steps(t) * LANES; i += LANES) {
    Vec u = load(input + i), dt = load(step + i) + bias;
    dt = x.softplus ? softplus(dt) : dt;
    store(step + i, dt);
    store(input + i, dt * u);
    store(sum + i, skip * u);
  }
}

void forward(const Forward& x, int64_t n, int64_t channel, int64_t count) {
  const int64_t N = x.states, size = N * LANES, blocks = (count + LANES - 1) / LANES;
  Scratch scratch(4 * (Unit<Forward>::size(x, count) + blocks * size + 3 * PIECE));
  Unit<Forward> unit(x, scratch, n, channel, count);
  float* h = scratch.take(blocks * size);
  float *step = scratch.take(PIECE), *input = scratch.take(PIECE), *y = scratch.take(PIECE);
  unit.for_blocks([&](int64_t k, int64_t at, int64_t some) { read_block(h + k * size, x.state, n, at, some, N); });
  for (int64_t t = unit.s.start; t < unit.s.stop; t += STEPS) {
    const int64_t steps = unit.steps(t);
    unit.read_projections(t);
    unit.for_blocks([&](int64_t k, int64_t at, int64_t some) {
      float* states = h + k * size;
      if (x.before && (t - unit.s.start) % x.kept == 0) {
        Row<float> kept(unit.kept(t, at), x.is_large());
        for (int64_t i = 0; i < size; i += LANES) kept.put(i, load(states + i), LANES);
      }
      prepare(unit, k, t, at, some, step, input, y);
      for_states(N, [&]<int COUNT>(int64_t first) {
        advance<COUNT>(states + first * LANES, unit.constant(k).decay + first * LANES, unit.B + first, unit.C + first,
                       N, step, input, y, steps);
      });
      if (x.z) {
        float* z = input;
        read_tokens(z, x.z, unit.s.row, t, at, steps, some, STEPS);
        for (int64_t i = 0; i < steps * LANES; i += LANES)
          store(y + i, load(y + i) * (load(z + i) * sigmoid(load(z + i))));
      }
      write_tokens(x.y, unit.s.row, t, at, steps, some, y, x.is_large());
    });
  }
  end_streams();
  unit.for_blocks([&](int64_t k, int64_t at, int64_t some) { write_block(x.last, n, at, some, N, h + k * size); });
}

// A piece of a block in the backward pass: STEPS vectors of each.
struct Piece {
  float *u, *step, *input, *slope;    // slope: of step by dt
  float *d_sum, *d_gate;              // gradients of the sum and, over the sum, of z
  float *sum, *d_input, *d_exponent;  // sums over the states
  static constexpr int64_t SIZE = 9 * PIECE;
  explicit Piece(float* data) {
    for (float** part : {&u, &step, &input, &slope, &d_sum, &d_gate, &sum, &d_input, &d_exponent}) {
      *part = data;
      data += PIECE;
    }
  }
};

// COUNT states of a block forwards, as in `advance`; their decays and the states before each step are kept.
template <int COUNT>
void retrace(const float* states, const float* decay, const float* B, const float* C, int64_t projections,
             const Piece& p, int64_t steps, float* decays, float* befores, float* d_C) {
  Vec h[COUNT];
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; i++) h[i] = load(states + i * LANES);
  for (int64_t t = 0; t < steps; t++) {
    Vec dt = load(p.step + t * LANES), in = load(p.input + t * LANES), g = load(p.d_sum + t * LANES);
    Vec even = load(p.sum + t * LANES), odd = zeros();
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++) {
      Vec a = exp2(dt * load(decay + i * LANES));
      store(decays + (t * COUNT + i) * LANES, a);
      store(befores + (t * COUNT + i) * LANES, h[i]);
      h[i] = a * h[i] + in * B[t * projections + i];
      (i % 2 ? odd : even) += h[i] * C[t * projections + i];
      float* to = d_C + (t * projections + i) * LANES;
      store(to, load(to) + g * h[i]);
    }
    store(p.sum + t * LANES, even + odd);
  }
}

// The same states backwards. `d_states` are the gradients of the states after the piece, and then of those before it.
template <int COUNT>
void turn_back(float* d_states, float* d_decay, const float* decay, const float* B, const float* C, int64_t projections,
               const Piece& p, int64_t steps, const float* decays, const float* befores, float* d_B) {
  Vec d[COUNT], d_A[COUNT];
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; i++) {
    d[i] = load(d_states + i * LANES);
    d_A[i] = load(d_decay + i * LANES);
  }
  for (int64_t t = steps - 1; t >= 0; t--) {
    Vec dt = load(p.step + t * LANES), in = load(p.input + t * LANES), g = load(p.d_sum + t * LANES);
    Vec d_input = load(p.d_input + t * LANES), d_exponent = load(p.d_exponent + t * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++) {
      d[i] += g * C[t * projections + i];
      float* to = d_B + (t * projections + i) * LANES;
      store(to, load(to) + d[i] * in);
      d_input += d[i] * B[t * projections + i];
      d[i] *= load(decays + (t * COUNT + i) * LANES);
      Vec e = d[i] * load(befores + (t * COUNT + i) * LANES);
      d_exponent += e * load(decay + i * LANES);
      d_A[i] += e * dt;
    }
    store(p.d_input + t * LANES, d_input);
    store(p.d_exponent + t * LANES, d_exponent);
  }
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; i++) {
    store(d_states + i * LANES, d[i]);
    store(d_decay + i * LANES, d_A[i]);
  }
}

// Reads a block's tokens and computes all that does not depend on the states.
void begin(const Backward& x, const Piece& p, const Constants& constant, int64_t row, int64_t t, int64_t channel,
           int64_t steps, int64_t count) {
  read_tokens(p.u, x.u, row, t, channel, steps, count, -STEPS);
  read_tokens(p.step, x.dt, row, t, channel, steps, count, -STEPS);
  read_tokens(p.d_sum, x.d_y, row, t, channel, steps, count, -STEPS);
  if (x.z) read_tokens(p.d_gate, x.z, row, t, channel, steps, count, -STEPS);
  Vec bias = load(constant.bias), skip = load(constant.skip);
  for (int64_t i = 0; i < steps * LANES; i += LANES) {
    Vec raw = load(p.step + i) + bias, u = load(p.u + i);
    Vec step = x.softplus ? softplus(raw) : raw;
    store(p.slope + i, x.softplus ? sigmoid(raw) : broadcast(1.0f));
    store(p.step + i, step);
    store(p.input + i, step * u);
    store(p.sum + i, skip * u);
    store(p.d_input + i, zeros());
    store(p.d_exponent + i, zeros());
    if (x.z) {
      Vec z = load(p.d_gate + i), open = sigmoid(z), d_y = load(p.d_sum + i);
      store(p.d_sum + i, d_y * (z * open));
      store(p.d_gate + i, d_y * (open * (1.0f + z * (1.0f - open))));
    }
  }
}

// Writes a block's gradients; adds to those of D and dt_bias.
void finish(const Backward& x, const Piece& p, const Constants& constant, int64_t row, int64_t t, int64_t channel,
            int64_t steps, int64_t count, float* d_skip, float* d_bias) {
  Vec skip = load(constant.skip), of_skip = load(d_skip), of_bias = load(d_bias);
  for (int64_t i = (steps - 1) * LANES; i >= 0; i -= LANES) {
    Vec u = load(p.u + i), d_sum = load(p.d_sum + i), d_input = load(p.d_input + i);
    Vec d_dt = (load(p.d_exponent + i) * LN2 + u * d_input) * load(p.slope + i);
    of_skip += d_sum * u;
    of_bias += d_dt;
    store(p.d_exponent + i, d_dt);
    store(p.d_input + i, load(p.step + i) * d_input + skip * d_sum);
    store(p.d_gate + i, load(p.d_gate + i) * load(p.sum + i));
  }
  store(d_skip, of_skip);
  store(d_bias, of_bias);
  write_tokens(x.d_u, row, t, channel, steps, count, p.d_input, x.is_large());
  write_tokens(x.d_dt, row, t, channel, steps, count, p.d_exponent, x.is_large());
  if (x.z) write_tokens(x.d_z, row, t, channel, steps, count, p.d_gate, x.is_large());
}

// to[i] = the sum of the lanes of vector i.
void sum_lanes(float* to, const float* vectors, int64_t count) {
  for (int64_t first = 0; first < count; first += LANES) {
    Vec rows[LANES];
    int64_t some = std::min<int64_t>(LANES, count - first);
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; i++) rows[i] = i < some ? load(vectors + (first + i) * LANES) : zeros();
    store_some(to + first, sums(rows), some);
  }
}

// The states of a unit before each piece of those that begin at `from`, from those that were kept.
void recall(Unit<Backward>& unit, int64_t from, int64_t pieces, float* states, int64_t stride, const Piece& p) {
  const int64_t N = unit.states, size = N * LANES;
  unit.for_blocks([&](int64_t k, int64_t at, int64_t) {
    std::memcpy(states + k * size, unit.kept(from, at), 4 * size);
    const float* next = unit.kept(from, at) - Unit<Backward>::blocks(unit.x.channels) * size;
    for (int64_t i = 0; i < size; i += LANES) __builtin_prefetch(next + i, 0, 2);
  });
  for (int64_t piece = 0; piece < pieces - 1; piece++, from += STEPS, states += stride) {
    unit.read_projections(from);
    unit.for_blocks([&](int64_t k, int64_t at, int64_t some) {
      std::memcpy(states + stride + k * size, states + k * size, 4 * size);
      prepare(unit, k, from, at, some, p.step, p.input, p.sum);
      for_states(N, [&]<int COUNT>(int64_t first) {
        advance<COUNT>(states + stride + k * size + first * LANES, unit.constant(k).decay + first * LANES,
                       unit.B + first, unit.C + first, N, p.step, p.input, p.sum, unit.steps(from));
      });
    });
  }
}

// Sequence n and the channels of one group, from its last piece to its first.
void backward(const Backward& x, int64_t n, int64_t group) {
  const int64_t N = x.states, size = N * LANES, channel = group * x.group,
                count = std::min(x.group, x.channels - channel);
  const int64_t blocks = (count + LANES - 1) / LANES, pieces = x.kept / STEPS;
  Scratch scratch(4 * (Unit<Backward>::size(x, count) + (1 + pieces) * blocks * size + 2 * STEPS * size +
                       2 * PIECE * AT_ONCE + Piece::SIZE));
  Unit<Backward> unit(x, scratch, n, channel, count);
  float *d_h = scratch.take(blocks * size), *states = scratch.take(pieces * blocks * size);
  float *d_B = scratch.take(STEPS * size), *d_C = scratch.take(STEPS * size);
  float *decays = scratch.take(PIECE * AT_ONCE), *befores = scratch.take(PIECE * AT_ONCE);
  Piece p(scratch.take(Piece::SIZE));
  float* of_channels =
      x.by_sequence.at<float>((n * Unit<Backward>::blocks(x.channels) + channel / LANES) * (N + 2) * LANES);
  std::fill_n(of_channels, blocks * (N + 2) * LANES, 0.0f);
  unit.for_blocks([&](int64_t k, int64_t at, int64_t some) { read_block(d_h + k * size, x.d_last, n, at, some, N); });

  auto turn = [&](int64_t t, const float* before) {
    const int64_t steps = unit.steps(t), row = unit.s.row;
    unit.read_projections(t);
    std::fill_n(d_B, steps * size, 0.0f);
    std::fill_n(d_C, steps * size, 0.0f);
    unit.for_blocks([&](int64_t k, int64_t at, int64_t some) {
      const Constants constant = unit.constant(k);
      float* of_block = of_channels + k * (N + 2) * LANES;
      begin(x, p, constant, row, t, at, steps, some);
      for_states(N, [&]<int COUNT>(int64_t first) {
        const int64_t from = first * LANES;
        retrace<COUNT>(before + k * size + from, constant.decay + from, unit.B + first, unit.C + first, N, p, steps,
                       decays, befores, d_C + from);
        turn_back<COUNT>(d_h + k * size + from, of_block + from, constant.decay + from, unit.B + first, unit.C + first,
                         N, p, steps, decays, befores, d_B + from);
      });
      finish(x, p, constant, row, t, at, steps, some, of_block + size, of_block + size + LANES);
    });
    for (int64_t i = 0; i < steps; i++) {
      float* to = x.by_group.at<float>(group, row * x.length + t + i);
      sum_lanes(to, d_B + i * size, N);
      sum_lanes(to + N, d_C + i * size, N);
    }
  };
  const int64_t length = unit.s.stop - unit.s.start;
  for (int64_t from = round_up(length, x.kept) - x.kept; from >= 0; from -= x.kept) {
    const int64_t here = (std::min(x.kept, length - from) + STEPS - 1) / STEPS;
    recall(unit, unit.s.start + from, here, states, blocks * size, p);
    for (int64_t i = here - 1; i >= 0; i--) turn(unit.s.start + from + i * STEPS, states + i * blocks * size);
  }
  end_streams();
  unit.for_blocks([&](int64_t k, int64_t at, int64_t some) { write_block(x.d_state, n, at, some, N, d_h + k * size); });
}

// What B and C receive at the tokens begin .. end of all rows.
void sum_groups(const Backward& x, int64_t groups, int64_t begin, int64_t end) {
  const int64_t N = x.states;
  Scratch scratch(4 * 2 * N);
  float* total = scratch.take(2 * N);
  for (int64_t token = begin; token < end; token++) {
    std::fill_n(total, 2 * N, 0.0f);
    for (int64_t group = 0; group < groups; group++) {
      const float* part = x.by_group.at<float>(group, token);
      for (int64_t i = 0; i < 2 * N; i++) total[i] += part[i];
    }
    write(x.d_B, token * N, total, N, 1);
    write(x.d_C, token * N, total + N, N, 1);
  }
}

// What A, D and dt_bias receive for the channels of one block.
void sum_sequences(const Backward& x, int64_t block) {
  const int64_t size = (x.states + 2) * LANES, at = block * LANES, some = std::min<int64_t>(LANES, x.channels - at);
  Scratch scratch(4 * size);
  float* total = scratch.take(size);
  std::fill_n(total, size, 0.0f);
  for (int64_t n = 0; n < x.sequences; n++) {
    const float* part = x.by_sequence.at<float>((n * Unit<Backward>::blocks(x.channels) + block) * size);
    for (int64_t i = 0; i < size; i += LANES) store(total + i, load(total + i) + load(part + i));
  }
  write_block(alone(x.d_A), 0, at, some, x.states, total);
  if (x.D) write(x.d_D, at, total + size - 2 * LANES, some, 1);
  if (x.dt_bias) write(x.d_dt_bias, at, total + size - LANES, some, 1);
}

}  // namespace

KERNEL(selective_scan_forward, Forward) {
  for_channels(arguments.sequences, arguments.channels, WIDEST,
               [&](int64_t n, int64_t first, int64_t count) { forward(arguments, n, first, count); });
}

KERNEL(selective_scan_backward, Backward) {
  int64_t groups = (arguments.channels + arguments.group - 1) / arguments.group;
  parallel_ranges(arguments.sequences * groups, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) backward(arguments, unit / groups, unit % groups);
  });
  int64_t rows = arguments.cu_seqlens ? 1 : arguments.sequences;
  parallel_ranges(rows * arguments.length,
                  [&](int64_t begin, int64_t end) { sum_groups(arguments, groups, begin, end); });
  parallel_ranges(Unit<Backward>::blocks(arguments.channels), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) sum_sequences(arguments, block);
  });
}

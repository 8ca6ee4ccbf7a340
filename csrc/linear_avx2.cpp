// The AVX2 matrix kernels (Haswell, Zen 1-3): unsigned codes by signed activations with VPMADDUBSW, no VNNI.
//
// Exactness. VPMADDUBSW adds two products into int16 with saturation: codes of up to 6 bits give at most 2 * 63 * 127 =
// 16,002. Sums of these wrap modulo 2**16, which is harmless as long as the final sum fits: each accumulator starts at
// -offset * (sum of its inputs), so that it ends at the sum of (code - offset) * x over 16 inputs, at most 16 * 16 * 127 =
// 32,512 for 5 bits; 6-bit forms change scale after 16 inputs, hence 8 products of at most 32 * 127. Eight-bit weights take
// |w| and x with w's sign instead: 2 * 128 * 127 = 32,512, widened at once.
//
// Registers: 16 rows are two vectors. `direct` decodes weights in registers for up to 4 tokens; `tile` multiplies a panel
// (a group decoded once into scratch) by R tokens. Both end in the same `finish`: one fma per block and output, in order
// of the blocks, so that a token's result does not depend on its neighbours.
#include <immintrin.h>
#include <string.h>

#include "kernel_tables.h"
#include "linear.h"
#include "pack.h"

namespace septet {
namespace {

using F8 = __m256;
using I8 = __m256i;

constexpr int DIRECT = 4;                   // tokens up to which decoding in registers wins
constexpr int DIRECT_BYTES = 8;             // the same for int8 weights, where a panel saves less
constexpr int64_t CHUNK_BYTES = 192 << 10;  // of quantised input that a panel's pass should find in L2
constexpr int64_t AHEAD = 4096;             // bytes of prefetch in the stream of weights
constexpr float TINY = 1e-30f;              // a block of smaller numbers counts as zero: 127 / it could overflow

// Kernels get their registers to themselves; a sum is kept where it is: left alone, GCC first makes all products of a block,
// spills them, and adds them up as a tree.
#define APART __attribute__((noinline))
#define KEEP(sum) __asm__("" : "+x"(sum))
#define IN_MEMORY() __asm__ volatile("" ::: "memory")

inline I8 load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline I8 spread(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
inline F8 halves8(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F8 bytes8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// A byte shuffle, the same in both halves of a register.
inline I8 cells(int64_t low, int64_t high) { return _mm256_set_epi64x(high, low, high, low); }

// What the compiler should know of a form.
template <Form F>
struct Traits {
  static constexpr Shape shape = shape_of(F);
  static constexpr bool bytes = shape.codes == 512;          // int8 weights
  static constexpr bool five = shape.bits == 64;
  static constexpr bool six = shape.bits == 128;             // two scales a block
  static constexpr bool minima = shape.minima != 0;
  static constexpr bool k_head = shape.head != 0;
  static constexpr int offset = bytes ? 0 : six ? 32 : five ? 16 : F == Form::q4_0 ? 8 : 0;
  static constexpr bool add_back = five && minima;           // q5_1, q5_k: unsigned, offset only to fit int16
};

// Scales of 8 rows (v = 0, 1) of a block, ready for use. s0, s1: int16 twice in each 32-bit lane; m01: (m0, m1).
struct Scales {
  F8 d, m;
  I8 s0, s1, m01;
};

template <Form F>
inline Scales read_scales(const uint8_t* head, const uint8_t* block, int v) {
  using T = Traits<F>;
  const uint8_t* scales = block + T::shape.codes + T::shape.bits;
  const uint8_t* minima = scales + T::shape.scales;
  Scales out;
  if constexpr (F == Form::q8_f) {
    out.d = _mm256_loadu_ps(reinterpret_cast<const float*>(scales) + 8 * v);
  } else if constexpr (T::six) {
    const I8 pairs = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 16 * v)));
    out.s0 = _mm256_shuffle_epi8(pairs, cells(0x0504050401000100, 0x0d0c0d0c09080908));
    out.s1 = _mm256_shuffle_epi8(pairs, cells(0x0706070603020302, 0x0f0e0f0e0b0a0b0a));
    out.d = halves8(head + 16 * v);
    if constexpr (T::minima) {
      out.m01 = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(minima + 16 * v)));
      out.m = halves8(head + 32 + 16 * v);
    }
  } else if constexpr (T::k_head) {
    out.d = _mm256_mul_ps(halves8(head + 16 * v), bytes8(scales + 8 * v));
    out.m = _mm256_mul_ps(halves8(head + 32 + 16 * v), bytes8(minima + 8 * v));
  } else {
    out.d = halves8(scales + 16 * v);
    if constexpr (T::minima) out.m = halves8(minima + 16 * v);
  }
  return out;
}

// Integer sums of 8 rows by one token over a block. Six-bit forms use both members, one for each half.
struct Sums {
  I8 a, b;
};

template <Form F, int L>
inline Sums start(const InputBlock<L>& x, int t) {
  using T = Traits<F>;
  const I8 less = _mm256_set1_epi16(-T::offset);
  if constexpr (T::six) return {_mm256_mullo_epi16(spread(&x.half[0][t]), less), _mm256_mullo_epi16(spread(&x.half[1][t]), less)};
  if constexpr (T::offset != 0) return {_mm256_mullo_epi16(spread(&x.pair[t]), less), less};
  return {_mm256_setzero_si256(), less};
}

// Codes of 8 rows x 4 inputs, line i of the block, times the token's inputs 4i .. 4i + 3.
template <Form F>
inline void add_line(Sums& sums, I8 codes, I8 x, int i) {
  if constexpr (Traits<F>::bytes) {
    const I8 two = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    sums.a = _mm256_add_epi32(sums.a, _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
    KEEP(sums.a);
  } else {
    const I8 two = _mm256_maddubs_epi16(codes, x);
    I8& sum = Traits<F>::six && i >= 4 ? sums.b : sums.a;
    sum = _mm256_add_epi16(sum, two);
    KEEP(sum);
  }
}

// acc += the block's part of 8 outputs. The one place that fixes the order of float operations.
template <Form F, int L>
inline F8 finish(F8 acc, const Sums& sums, const Scales& scales, const InputBlock<L>& x, int t) {
  using T = Traits<F>;
  I8 total = sums.a;
  if constexpr (T::six) total = _mm256_add_epi32(_mm256_madd_epi16(sums.a, scales.s0), _mm256_madd_epi16(sums.b, scales.s1));
  else if constexpr (!T::bytes) total = _mm256_madd_epi16(sums.a, _mm256_set1_epi16(1));
  if constexpr (T::add_back) total = _mm256_add_epi32(total, _mm256_set1_epi32(T::offset * x.sum[t]));
  const F8 dx = _mm256_broadcast_ss(&x.d[t]);
  acc = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(total), dx), scales.d, acc);
  if constexpr (T::minima && T::six) {
    const auto half = [&](int h) { return static_cast<int16_t>(x.half[h][t] & 0xffff) + (x.half[h][t] >> 16); };
    const I8 sums01 = _mm256_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(half(1)) << 16 | (static_cast<uint32_t>(half(0)) & 0xffff)));
    const F8 low = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(scales.m01, sums01)), dx);
    acc = _mm256_fnmadd_ps(low, scales.m, acc);
  } else if constexpr (T::minima && T::k_head) {
    acc = _mm256_fnmadd_ps(_mm256_broadcast_ss(&x.ds[t]), scales.m, acc);
  } else if constexpr (T::minima) {
    acc = _mm256_fmadd_ps(_mm256_broadcast_ss(&x.ds[t]), scales.m, acc);
  }
  return acc;
}

// Codes of 8 rows (v): lines j (low nibbles) and 4 + j (high), with the bits above the nibble.
template <Form F>
struct Decoder {
  using T = Traits<F>;
  const uint8_t* block;
  int v;
  I8 h0, h1;  // bit planes

  Decoder(const uint8_t* at, int half) : block(at), v(half) {
    if constexpr (T::five || T::six) h0 = load(at + 256 + 32 * half);
    if constexpr (T::six) h1 = load(at + 320 + 32 * half);
  }
  template <int J>
  void lines(I8& low, I8& high) const {
    const I8 raw = load(block + 64 * J + 32 * v), nibble = _mm256_set1_epi8(15);
    low = _mm256_and_si256(raw, nibble);
    high = _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble);
    if constexpr (T::five) {
      const I8 fifth = _mm256_set1_epi8(16);
      low = _mm256_or_si256(low, _mm256_and_si256(_mm256_slli_epi16(h0, 4 - J), fifth));
      high = _mm256_or_si256(high, _mm256_and_si256(_mm256_srli_epi16(h0, J), fifth));
    }
    if constexpr (T::six) {
      low = _mm256_or_si256(low, top_two<J>(h0));
      high = _mm256_or_si256(high, top_two<J>(h1));
    }
  }
  template <int J>
  static I8 top_two(I8 plane) {
    const I8 moved = J <= 2 ? _mm256_slli_epi16(plane, J <= 2 ? 4 - 2 * J : 0) : _mm256_srli_epi16(plane, 2);
    return _mm256_and_si256(moved, _mm256_set1_epi8(48));
  }
};

template <Form F, int R, int J, int L>
inline void direct_lines(const Decoder<F>& decoder, Sums (&sums)[R], const InputBlock<L>& x) {
  if constexpr (Traits<F>::bytes) {
    for (int i = 2 * J; i < 2 * J + 2; i++) {
      const I8 codes = load(decoder.block + 64 * i + 32 * decoder.v);
      for (int t = 0; t < R; t++) add_line<F>(sums[t], codes, spread(x.q[i][t]), i);
    }
  } else {
    I8 low, high;
    decoder.template lines<J>(low, high);
    for (int t = 0; t < R; t++) add_line<F>(sums[t], low, spread(x.q[J][t]), J);
    for (int t = 0; t < R; t++) add_line<F>(sums[t], high, spread(x.q[4 + J][t]), 4 + J);
  }
}

// A group by R tokens of L lanes, weights decoded in registers. x: the tokens' first block. c (R, 16).
template <Form F, int R, int L>
APART void direct(const uint8_t* group, const InputBlock<L>* x, int64_t blocks, float* c) {
  constexpr Shape shape = Traits<F>::shape;
  F8 acc[R][2];
  for (int t = 0; t < R; t++) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
  const uint8_t* p = group;
  const uint8_t* head = group;
  for (int64_t b = 0; b < blocks; b++, p += shape.block(), x++) {
    if constexpr (shape.head != 0) {
      if (b % 8 == 0) head = p, p += shape.head;
    }
    for (int line = 0; line < shape.block(); line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD + line), _MM_HINT_T0);
    for (int v = 0; v < 2; v++) {
      Sums sums[R];
      for (int t = 0; t < R; t++) sums[t] = start<F>(*x, t);
      const Decoder<F> decoder(p, v);
      direct_lines<F, R, 0>(decoder, sums, *x);
      direct_lines<F, R, 1>(decoder, sums, *x);
      direct_lines<F, R, 2>(decoder, sums, *x);
      direct_lines<F, R, 3>(decoder, sums, *x);
      const Scales scales = read_scales<F>(head, p, v);
      for (int t = 0; t < R; t++) acc[t][v] = finish<F>(acc[t][v], sums[t], scales, *x, t);
    }
  }
  for (int t = 0; t < R; t++)
    for (int v = 0; v < 2; v++) _mm256_storeu_ps(c + 16 * t + 8 * v, acc[t][v]);
}

// -- panels -----------------------------------------------------------------------------------------------------------
// A block of a panel: 8 lines of codes (16 rows x 4 inputs, a byte each), then the scales as `finish` wants them.
struct alignas(64) PanelBlock {
  uint8_t codes[512];
  Scales scales[2];
};

template <Form F, int J>
inline void unpack_lines(const Decoder<F>& decoder, PanelBlock& out) {
  I8 low, high;
  decoder.template lines<J>(low, high);
  _mm256_store_si256(reinterpret_cast<I8*>(out.codes + 64 * J + 32 * decoder.v), low);
  _mm256_store_si256(reinterpret_cast<I8*>(out.codes + 64 * (4 + J) + 32 * decoder.v), high);
}

template <Form F>
void unpack(const uint8_t* group, int64_t blocks, PanelBlock* panel) {
  constexpr Shape shape = Traits<F>::shape;
  const uint8_t* p = group;
  const uint8_t* head = group;
  for (int64_t b = 0; b < blocks; b++, p += shape.block(), panel++) {
    if constexpr (shape.head != 0) {
      if (b % 8 == 0) head = p, p += shape.head;
    }
    for (int v = 0; v < 2; v++) {
      panel->scales[v] = read_scales<F>(head, p, v);
      if constexpr (!Traits<F>::bytes) {
        const Decoder<F> decoder(p, v);
        unpack_lines<F, 0>(decoder, *panel);
        unpack_lines<F, 1>(decoder, *panel);
        unpack_lines<F, 2>(decoder, *panel);
        unpack_lines<F, 3>(decoder, *panel);
      }
    }
    if constexpr (Traits<F>::bytes) memcpy(panel->codes, p, 512);
  }
}

// A panel by R tokens of four lanes. x: the tokens' first block. c (R, 16), 32-byte aligned; sums of floats live there, so
// that the registers hold integer sums only.
template <Form F, int R>
APART void tile(const PanelBlock* panel, const InputBlock<4>* x, int64_t blocks, float* c) {
  for (int i = 0; i < 2 * R; i++) _mm256_store_ps(c + 8 * i, _mm256_setzero_ps());
  for (int64_t b = 0; b < blocks; b++, panel++, x++) {
    Sums sums[R][2];
    for (int t = 0; t < R; t++) sums[t][0] = sums[t][1] = start<F>(*x, t);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const I8 w0 = load(panel->codes + 64 * i), w1 = load(panel->codes + 64 * i + 32);
#pragma GCC unroll 8
      for (int t = 0; t < R; t++) {
        const I8 in = spread(x->q[i][t]);
        add_line<F>(sums[t][0], w0, in, i);
        add_line<F>(sums[t][1], w1, in, i);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < R; t++)
      for (int v = 0; v < 2; v++) {
        float* out = c + 16 * t + 8 * v;
        _mm256_store_ps(out, finish<F>(_mm256_load_ps(out), sums[t][v], panel->scales[v], *x, t));
      }
    IN_MEMORY();
  }
}

// -- storing ----------------------------------------------------------------------------------------------------------
// c (count, 16) -> y rows, plus bias. `rows` < 16 in the last group only.
void store(const float* c, int64_t count, int64_t rows, float* y, int64_t ldy, const float* bias) {
  for (int64_t t = 0; t < count; t++) {
    const float* in = c + 16 * t;
    float* out = y + t * ldy;
    if (rows == GROUP) {
      F8 low = _mm256_loadu_ps(in), high = _mm256_loadu_ps(in + 8);
      if (bias) low = _mm256_add_ps(low, _mm256_loadu_ps(bias)), high = _mm256_add_ps(high, _mm256_loadu_ps(bias + 8));
      _mm256_storeu_ps(out, low);
      _mm256_storeu_ps(out + 8, high);
    } else {
      for (int64_t r = 0; r < rows; r++) out[r] = bias ? in[r] + bias[r] : in[r];
    }
  }
}

inline int64_t rows_of(const Packed& w, int64_t g) { return w.n - g * GROUP < GROUP ? w.n - g * GROUP : GROUP; }

// Where a range of groups writes: y, ldy, bias.
struct Out {
  float* y;
  int64_t ldy;
  const float* bias;
};

inline void store_group(const Packed& w, int64_t g, const float* c, int64_t t, int64_t count, const Out& out) {
  store(c, count, rows_of(w, g), out.y + t * out.ldy + g * GROUP, out.ldy, out.bias ? out.bias + g * GROUP : nullptr);
}

// -- quantised weights ------------------------------------------------------------------------------------------------
inline const InputBlock<4>* four(const QuantInput& qx, int64_t t) {
  return reinterpret_cast<const InputBlock<4>*>(qx.data) + t / 4 * qx.blocks;
}

// 1 .. 4 tokens from t on, t a multiple of 4.
template <Form F>
void direct_any(const uint8_t* group, const QuantInput& qx, int64_t t, int64_t count, float* c) {
  if (qx.lanes == 1) direct<F, 1, 1>(group, reinterpret_cast<const InputBlock<1>*>(qx.data), qx.blocks, c);
  else if (count == 1) direct<F, 1, 4>(group, four(qx, t), qx.blocks, c);
  else if (count == 2) direct<F, 2, 4>(group, four(qx, t), qx.blocks, c);
  else if (count == 3) direct<F, 3, 4>(group, four(qx, t), qx.blocks, c);
  else direct<F, 4, 4>(group, four(qx, t), qx.blocks, c);
}

template <Form F>
void tile_any(const PanelBlock* panel, const QuantInput& qx, int64_t t, int64_t count, float* c) {
  if (count == 1) tile<F, 1>(panel, four(qx, t), qx.blocks, c);
  else if (count == 2) tile<F, 2>(panel, four(qx, t), qx.blocks, c);
  else if (count == 3) tile<F, 3>(panel, four(qx, t), qx.blocks, c);
  else tile<F, 4>(panel, four(qx, t), qx.blocks, c);
}

template <Form F>
void quantized(const Packed& w, const QuantInput& qx, int64_t t_count, int64_t g0, int64_t g1, const Out& out) {
  alignas(64) float c[4 * GROUP];
  void* memory = t_count > (Traits<F>::bytes ? DIRECT_BYTES : DIRECT) ? thread_scratch(qx.blocks * static_cast<int64_t>(sizeof(PanelBlock))) : nullptr;
  if (!memory) {  // few tokens, or no memory for a panel
    for (int64_t g = g0; g < g1; g++)
      for (int64_t t = 0; t < t_count; t += 4) {
        const int64_t count = t_count - t < 4 ? t_count - t : 4;
        direct_any<F>(w.data + g * w.group_bytes, qx, t, count, c);
        store_group(w, g, c, t, count, out);
      }
    return;
  }
  PanelBlock* panel = static_cast<PanelBlock*>(memory);
  const int64_t fit = CHUNK_BYTES / (qx.blocks * static_cast<int64_t>(sizeof(InputBlock<4>))) * 4, chunk = fit < 64 ? 64 : fit;
  for (int64_t begin = 0; begin < t_count; begin += chunk) {
    const int64_t end = t_count - begin < chunk ? t_count : begin + chunk;
    for (int64_t g = g0; g < g1; g++) {
      unpack<F>(w.data + g * w.group_bytes, qx.blocks, panel);
      for (int64_t t = begin; t < end; t += 4) {
        const int64_t count = end - t < 4 ? end - t : 4;
        tile_any<F>(panel, qx, t, count, c);
        store_group(w, g, c, t, count, out);
      }
    }
  }
}

// -- dense weights ----------------------------------------------------------------------------------------------------
// 16 rows of one input (of two inputs for bf16).
template <Form F>
struct Column {
  F8 first[2], second[2];

  explicit Column(const uint8_t* at) {
    for (int v = 0; v < 2; v++) {
      if constexpr (F == Form::f32) first[v] = _mm256_loadu_ps(reinterpret_cast<const float*>(at) + 8 * v);
      if constexpr (F == Form::f16) first[v] = halves8(at + 16 * v);
      if constexpr (F == Form::bf16) {
        const I8 raw = load(at + 32 * v);
        first[v] = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
        second[v] = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
      }
    }
  }
};

// acc (R tokens, G groups, 2) += input i (a pair of inputs for bf16) of G groups.
template <Form F, int R, int G>
inline void dense_step(F8 (&acc)[R][G][2], const uint8_t* p, int64_t stride, const float* x, int64_t ldx, bool pair) {
  for (int g = 0; g < G; g++) {
    const Column<F> w(p + g * stride);
    for (int t = 0; t < R; t++) {
      const F8 in = _mm256_broadcast_ss(x + t * ldx);
      for (int v = 0; v < 2; v++) acc[t][g][v] = _mm256_fmadd_ps(w.first[v], in, acc[t][g][v]);
    }
    if constexpr (F == Form::bf16) {
      for (int t = 0; pair && t < R; t++) {
        const F8 in = _mm256_broadcast_ss(x + t * ldx + 1);
        for (int v = 0; v < 2; v++) acc[t][g][v] = _mm256_fmadd_ps(w.second[v], in, acc[t][g][v]);
      }
    }
  }
}

// G groups from `group` on by R tokens -> c (G, R, 16).
template <Form F, int R, int G>
APART void dense_tile(const Packed& w, const uint8_t* group, const float* x, int64_t ldx, float* c) {
  constexpr Shape shape = shape_of(F);
  F8 acc[R][G][2];
  for (int t = 0; t < R; t++)
    for (int g = 0; g < G; g++) acc[t][g][0] = acc[t][g][1] = _mm256_setzero_ps();
  const uint8_t* p = group;
  int64_t i = 0;
  for (; i + shape.inputs <= w.k; i += shape.inputs, p += shape.codes) {
    if constexpr (R == 1) _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD / 4), _MM_HINT_T0);
    dense_step<F, R, G>(acc, p, w.group_bytes, x + i, ldx, true);
  }
  if (i < w.k) dense_step<F, R, G>(acc, p, w.group_bytes, x + i, ldx, false);
  for (int g = 0; g < G; g++)
    for (int t = 0; t < R; t++)
      for (int v = 0; v < 2; v++) _mm256_storeu_ps(c + (g * R + t) * 16 + 8 * v, acc[t][g][v]);
}

template <Form F, int R, int G>
void dense_groups(const Packed& w, const float* x, int64_t ldx, int64_t t, int64_t g, const Out& out) {
  alignas(64) float c[R * G * GROUP];
  dense_tile<F, R, G>(w, w.data + g * w.group_bytes, x + t * ldx, ldx, c);
  for (int i = 0; i < G; i++) store_group(w, g + i, c + i * R * GROUP, t, R, out);
}

// Few tokens take two or three groups at a time: independent sums hide the latency of the fma.
template <Form F>
void dense(const Packed& w, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1, const Out& out) {
  constexpr int R = F == Form::bf16 ? 4 : 5;  // what 16 registers hold beside the weights
  int64_t g = g0;
  if (t_count == 1)
    for (; g + 3 <= g1; g += 3) dense_groups<F, 1, 3>(w, x, ldx, 0, g, out);
  if (t_count == 2)
    for (; g + 2 <= g1; g += 2) dense_groups<F, 2, 2>(w, x, ldx, 0, g, out);
  for (; g < g1; g++) {
    int64_t t = 0;
    for (; t + R <= t_count; t += R) dense_groups<F, R, 1>(w, x, ldx, t, g, out);
    const int64_t left = t_count - t;
    if (R > 4 && left == 4) dense_groups<F, 4, 1>(w, x, ldx, t, g, out);
    else if (left == 3) dense_groups<F, 3, 1>(w, x, ldx, t, g, out);
    else if (left == 2) dense_groups<F, 2, 1>(w, x, ldx, t, g, out);
    else if (left == 1) dense_groups<F, 1, 1>(w, x, ldx, t, g, out);
  }
}

void linear(const Packed& w, const QuantInput& qx, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1,
            float* y, int64_t ldy, const float* bias) {
  const Out out{y, ldy, bias};
  switch (w.form) {
    case Form::q4_0: return quantized<Form::q4_0>(w, qx, t_count, g0, g1, out);
    case Form::q4_1: return quantized<Form::q4_1>(w, qx, t_count, g0, g1, out);
    case Form::q5_0: return quantized<Form::q5_0>(w, qx, t_count, g0, g1, out);
    case Form::q5_1: return quantized<Form::q5_1>(w, qx, t_count, g0, g1, out);
    case Form::q8_0: return quantized<Form::q8_0>(w, qx, t_count, g0, g1, out);
    case Form::q4_k: return quantized<Form::q4_k>(w, qx, t_count, g0, g1, out);
    case Form::q5_k: return quantized<Form::q5_k>(w, qx, t_count, g0, g1, out);
    case Form::q6_k: return quantized<Form::q6_k>(w, qx, t_count, g0, g1, out);
    case Form::q2_k: return quantized<Form::q2_k>(w, qx, t_count, g0, g1, out);
    case Form::q8_f: return quantized<Form::q8_f>(w, qx, t_count, g0, g1, out);
    case Form::bf16: return dense<Form::bf16>(w, x, ldx, t_count, g0, g1, out);
    case Form::f16: return dense<Form::f16>(w, x, ldx, t_count, g0, g1, out);
    case Form::f32: return dense<Form::f32>(w, x, ldx, t_count, g0, g1, out);
  }
}

// -- activations ------------------------------------------------------------------------------------------------------
inline float biggest(F8 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline float total(F8 v) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

// 32 floats -> 32 int8 in order. Values beyond +-127 (or NaN) end at +-127.
inline I8 to_bytes(const F8 (&x)[4], F8 inverse) {
  I8 n[4];
  for (int i = 0; i < 4; i++) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inverse));
  const I8 a = _mm256_packs_epi32(n[0], n[1]), b = _mm256_packs_epi32(n[2], n[3]);
  const I8 mixed = _mm256_max_epi8(_mm256_packs_epi16(a, b), _mm256_set1_epi8(-127));
  return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

template <int L>
inline void lay_out(InputBlock<L>& to, int t, I8 q, float d) {
  alignas(32) int8_t bytes[32];
  _mm256_store_si256(reinterpret_cast<I8*>(bytes), q);
  for (int i = 0; i < 8; i++) memcpy(to.q[i][t], bytes + 4 * i, 4);
  I8 lanes = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);  // int16: sums of neighbours; even ones: inputs 0, 1 mod 4
  lanes = _mm256_add_epi16(lanes, _mm256_srli_si256(lanes, 8));
  lanes = _mm256_add_epi16(lanes, _mm256_srli_si256(lanes, 4));
  const __m128i both = _mm_add_epi16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  const int32_t pair = _mm_cvtsi128_si32(both), sum = static_cast<int16_t>(pair & 0xffff) + (pair >> 16);
  to.d[t] = d;
  to.ds[t] = d * static_cast<float>(sum);
  to.sum[t] = sum;
  to.pair[t] = pair;
  to.half[0][t] = _mm256_cvtsi256_si32(lanes);
  to.half[1][t] = _mm256_extract_epi32(lanes, 4);
}

void quantize_block(const float* x, int64_t t, int64_t b, QuantInput& out) {
  F8 in[4], most = _mm256_setzero_ps(), poison = _mm256_setzero_ps();
  for (int i = 0; i < 4; i++) {
    in[i] = _mm256_loadu_ps(x + 8 * i);
    most = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), in[i]), most);
    poison = _mm256_fmadd_ps(in[i], _mm256_setzero_ps(), poison);  // NaN where x is not finite
  }
  const float peak = biggest(most), bad = total(poison);
  const bool zero = peak < TINY || bad != bad;
  const I8 q = to_bytes(in, _mm256_set1_ps(zero ? 0.0f : 127.0f / peak));
  const float d = (zero ? 0.0f : peak / 127.0f) + bad;
  if (out.lanes == 1) lay_out(reinterpret_cast<InputBlock<1>*>(out.data)[t * out.blocks + b], 0, q, d);
  else lay_out(reinterpret_cast<InputBlock<4>*>(out.data)[t / 4 * out.blocks + b], static_cast<int>(t % 4), q, d);
}

void quantize(const float* x, int64_t ldx, int64_t k, int64_t t0, int64_t t1, QuantInput& out) {
  const int64_t whole = k / BLOCK;
  for (int64_t t = t0; t < t1; t++) {
    for (int64_t b = 0; b < whole; b++) quantize_block(x + t * ldx + b * BLOCK, t, b, out);
    if (k % BLOCK) {
      float rest[BLOCK] = {};
      memcpy(rest, x + t * ldx + whole * BLOCK, static_cast<size_t>(k % BLOCK) * sizeof(float));
      quantize_block(rest, t, whole, out);
    }
  }
}

constexpr Kernels AVX2 = {Path::avx2, quantize, linear};

}  // namespace

const Kernels* avx2_kernels() { return &AVX2; }

}  // namespace septet

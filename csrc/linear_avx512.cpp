// The AVX-512 VNNI matrix kernels (Ice Lake, Zen 4 and later). The same plan as linear_avx2.cpp, where it is explained;
// here a vector is 16 rows, VPDPBUSD adds four products into int32 without saturation, so offsets go into the start value.
// int8 weights are made unsigned (w + 128). Float operations come in the AVX2 path's order: both give the same bits.
#include <immintrin.h>
#include <string.h>

#include "kernel_tables.h"
#include "linear.h"
#include "pack.h"

namespace septet {
namespace {

using F16 = __m512;
using I16 = __m512i;

constexpr int DIRECT = 4;                   // tokens up to which decoding in registers wins
constexpr int64_t CHUNK_BYTES = 384 << 10;  // of quantised input that a panel's pass should find in L2
constexpr int64_t AHEAD = 4096;             // bytes of prefetch in the stream of weights

// See linear_avx2.cpp.
#define APART __attribute__((noinline))
#if defined(SEPTET_EMULATE)
#define KEEP(sum)
#else
#define KEEP(sum) __asm__("" : "+v"(sum))
#endif
#define IN_MEMORY() __asm__ volatile("" ::: "memory")

inline I16 load(const void* p) { return _mm512_loadu_si512(p); }
inline I16 spread(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline F16 halves16(const uint8_t* p) { return _mm512_cvtph_ps(load32(p)); }
inline F16 bytes16(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

template <Form F>
struct Traits {
  static constexpr Shape shape = shape_of(F);
  static constexpr bool bytes = shape.codes == 512;  // int8 weights
  static constexpr bool five = shape.bits == 64;
  static constexpr bool six = shape.bits == 128;     // two scales a block
  static constexpr bool minima = shape.minima != 0;
  static constexpr bool k_head = shape.head != 0;
  static constexpr int offset = bytes ? 128 : F == Form::q5_0 ? 16 : F == Form::q4_0 ? 8 : 0;
};

// Scales of the 16 rows of a block. s0, s1: int32; m01: int16 (m0, m1).
struct Scales {
  F16 d, m;
  I16 s0, s1, m01;
};

template <Form F>
inline Scales read_scales(const uint8_t* head, const uint8_t* block) {
  using T = Traits<F>;
  const uint8_t* scales = block + T::shape.codes + T::shape.bits;
  const uint8_t* minima = scales + T::shape.scales;
  Scales out;
  if constexpr (F == Form::q8_f) {
    out.d = _mm512_loadu_ps(scales);
  } else if constexpr (T::six) {
    const I16 two = _mm512_cvtepi16_epi32(load32(scales));
    out.s0 = _mm512_srai_epi32(_mm512_slli_epi32(two, 24), 24);
    out.s1 = _mm512_srai_epi32(two, 8);
    out.d = halves16(head);
    if constexpr (T::minima) {
      const I16 mins = _mm512_cvtepu16_epi32(load32(minima));
      const I16 first = _mm512_and_si512(mins, _mm512_set1_epi32(255));
      out.m01 = _mm512_or_si512(first, _mm512_slli_epi32(_mm512_srli_epi32(mins, 8), 16));
      out.m = halves16(head + 32);
    }
  } else if constexpr (T::k_head) {
    out.d = _mm512_mul_ps(halves16(head), bytes16(scales));
    out.m = _mm512_mul_ps(halves16(head + 32), bytes16(minima));
  } else {
    out.d = halves16(scales);
    if constexpr (T::minima) out.m = halves16(minima);
  }
  return out;
}

// Integer sums of 16 rows by one token over a block. Six-bit forms use both members, one for each half.
struct Sums {
  I16 a, b;
};

template <int L>
inline int half_sum(const InputBlock<L>& x, int t, int h) {
  const int32_t two = x.half[h][t];
  return static_cast<int16_t>(two & 0xffff) + (two >> 16);
}

template <Form F, int L>
inline Sums start(const InputBlock<L>& x, int t) {
  using T = Traits<F>;
  const I16 zero = _mm512_setzero_si512();
  if constexpr (T::six) return {_mm512_set1_epi32(-32 * half_sum(x, t, 0)), _mm512_set1_epi32(-32 * half_sum(x, t, 1))};
  if constexpr (T::offset != 0) return {_mm512_set1_epi32(-T::offset * x.sum[t]), zero};
  return {zero, zero};
}

template <Form F>
inline void add_line(Sums& sums, I16 codes, I16 x, int i) {
  I16& sum = Traits<F>::six && i >= 4 ? sums.b : sums.a;
  sum = _mm512_dpbusd_epi32(sum, codes, x);
  KEEP(sum);
}

// acc += the block's part of 16 outputs. The one place that fixes the order of float operations.
template <Form F, int L>
inline F16 finish(F16 acc, const Sums& sums, const Scales& scales, const InputBlock<L>& x, int t) {
  using T = Traits<F>;
  I16 total = sums.a;
  if constexpr (T::six) total = _mm512_add_epi32(_mm512_mullo_epi32(sums.a, scales.s0), _mm512_mullo_epi32(sums.b, scales.s1));
  const F16 dx = _mm512_set1_ps(x.d[t]);
  acc = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), dx), scales.d, acc);
  if constexpr (T::minima && T::six) {
    const uint32_t high = static_cast<uint32_t>(half_sum(x, t, 1)) << 16, low = static_cast<uint32_t>(half_sum(x, t, 0)) & 0xffff;
    const I16 below = _mm512_madd_epi16(scales.m01, _mm512_set1_epi32(static_cast<int32_t>(high | low)));
    acc = _mm512_fnmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(below), dx), scales.m, acc);
  } else if constexpr (T::minima && T::k_head) {
    acc = _mm512_fnmadd_ps(_mm512_set1_ps(x.ds[t]), scales.m, acc);
  } else if constexpr (T::minima) {
    acc = _mm512_fmadd_ps(_mm512_set1_ps(x.ds[t]), scales.m, acc);
  }
  return acc;
}

// Codes of 16 rows: lines j (low nibbles) and 4 + j (high), with the bits above the nibble.
template <Form F>
struct Decoder {
  using T = Traits<F>;
  const uint8_t* block;
  I16 h0, h1;  // bit planes

  explicit Decoder(const uint8_t* at) : block(at) {
    if constexpr (T::five || T::six) h0 = load(at + 256);
    if constexpr (T::six) h1 = load(at + 320);
  }
  template <int J>
  void lines(I16& low, I16& high) const {
    if constexpr (T::bytes) {  // lines 2 J and 2 J + 1
      low = _mm512_xor_si512(load(block + 128 * J), _mm512_set1_epi8(-128));
      high = _mm512_xor_si512(load(block + 128 * J + 64), _mm512_set1_epi8(-128));
      return;
    }
    const I16 raw = load(block + 64 * J), nibble = _mm512_set1_epi8(15);
    low = _mm512_and_si512(raw, nibble);
    high = _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble);
    if constexpr (T::five) {
      const I16 fifth = _mm512_set1_epi8(16);
      low = _mm512_or_si512(low, _mm512_and_si512(_mm512_slli_epi16(h0, 4 - J), fifth));
      high = _mm512_or_si512(high, _mm512_and_si512(_mm512_srli_epi16(h0, J), fifth));
    }
    if constexpr (T::six) {
      low = _mm512_or_si512(low, top_two<J>(h0));
      high = _mm512_or_si512(high, top_two<J>(h1));
    }
  }
  template <int J>
  static I16 top_two(I16 plane) {
    const I16 moved = J <= 2 ? _mm512_slli_epi16(plane, J <= 2 ? 4 - 2 * J : 0) : _mm512_srli_epi16(plane, 2);
    return _mm512_and_si512(moved, _mm512_set1_epi8(48));
  }
  // Which lines of four inputs `lines<J>` gives.
  static constexpr int low_line(int j) { return T::bytes ? 2 * j : j; }
  static constexpr int high_line(int j) { return T::bytes ? 2 * j + 1 : 4 + j; }
};

template <Form F, int R, int J, int L>
inline void direct_lines(const Decoder<F>& decoder, Sums (&sums)[R], const InputBlock<L>& x) {
  I16 low, high;
  decoder.template lines<J>(low, high);
  constexpr int l = Decoder<F>::low_line(J), h = Decoder<F>::high_line(J);
  for (int t = 0; t < R; t++) add_line<F>(sums[t], low, spread(x.q[l][t]), l);
  for (int t = 0; t < R; t++) add_line<F>(sums[t], high, spread(x.q[h][t]), h);
}

// A group by R tokens of L lanes, weights decoded in registers. x: the tokens' first block. c (R, 16).
template <Form F, int R, int L>
APART void direct(const uint8_t* group, const InputBlock<L>* x, int64_t blocks, float* c) {
  constexpr Shape shape = Traits<F>::shape;
  F16 acc[R];
  for (int t = 0; t < R; t++) acc[t] = _mm512_setzero_ps();
  const uint8_t* p = group;
  const uint8_t* head = group;
  for (int64_t b = 0; b < blocks; b++, p += shape.block(), x++) {
    if constexpr (shape.head != 0) {
      if (b % 8 == 0) head = p, p += shape.head;
    }
    for (int line = 0; line < shape.block(); line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD + line), _MM_HINT_T0);
    Sums sums[R];
    for (int t = 0; t < R; t++) sums[t] = start<F>(*x, t);
    const Decoder<F> decoder(p);
    direct_lines<F, R, 0>(decoder, sums, *x);
    direct_lines<F, R, 1>(decoder, sums, *x);
    direct_lines<F, R, 2>(decoder, sums, *x);
    direct_lines<F, R, 3>(decoder, sums, *x);
    const Scales scales = read_scales<F>(head, p);
    for (int t = 0; t < R; t++) acc[t] = finish<F>(acc[t], sums[t], scales, *x, t);
  }
  for (int t = 0; t < R; t++) _mm512_storeu_ps(c + 16 * t, acc[t]);
}

// -- panels -----------------------------------------------------------------------------------------------------------
struct alignas(64) PanelBlock {
  uint8_t codes[512];  // 8 lines: 16 rows x 4 inputs, unsigned
  Scales scales;
};

template <Form F, int J>
inline void unpack_lines(const Decoder<F>& decoder, PanelBlock& out) {
  I16 low, high;
  decoder.template lines<J>(low, high);
  _mm512_store_si512(out.codes + 64 * Decoder<F>::low_line(J), low);
  _mm512_store_si512(out.codes + 64 * Decoder<F>::high_line(J), high);
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
    panel->scales = read_scales<F>(head, p);
    const Decoder<F> decoder(p);
    unpack_lines<F, 0>(decoder, *panel);
    unpack_lines<F, 1>(decoder, *panel);
    unpack_lines<F, 2>(decoder, *panel);
    unpack_lines<F, 3>(decoder, *panel);
  }
}

// G groups' panels, `stride` blocks apart, by R tokens of four lanes (R <= 8). x: the tokens' first block. c (G, R, 16),
// 64-byte aligned; sums of floats live there, so that the registers hold integer sums only.
template <Form F, int R, int G>
APART void tile(const PanelBlock* panel, int64_t stride, const InputBlock<4>* x, int64_t blocks, float* c) {
  for (int i = 0; i < G * R; i++) _mm512_store_ps(c + 16 * i, _mm512_setzero_ps());
  for (int64_t b = 0; b < blocks; b++, panel++, x++) {
    Sums sums[R][G];
    for (int t = 0; t < R; t++)
      for (int g = 0; g < G; g++) sums[t][g] = start<F>(x[t / 4 * blocks], t % 4);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      I16 w[G];
      for (int g = 0; g < G; g++) w[g] = load(panel[g * stride].codes + 64 * i);
#pragma GCC unroll 8
      for (int t = 0; t < R; t++) {
        const I16 in = spread(x[t / 4 * blocks].q[i][t % 4]);
        for (int g = 0; g < G; g++) add_line<F>(sums[t][g], w[g], in, i);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < R; t++)
      for (int g = 0; g < G; g++) {
        float* out = c + 16 * (g * R + t);
        _mm512_store_ps(out, finish<F>(_mm512_load_ps(out), sums[t][g], panel[g * stride].scales, x[t / 4 * blocks], t % 4));
      }
    IN_MEMORY();
  }
}

// -- storing ----------------------------------------------------------------------------------------------------------
// Where a range of groups writes: y, ldy, bias.
struct Out {
  float* y;
  int64_t ldy;
  const float* bias;
};

// c (count, 16) -> rows of group g at tokens t .. of y, plus bias.
inline void store_group(const Packed& w, int64_t g, const float* c, int64_t t, int64_t count, const Out& out) {
  const int64_t rows = w.n - g * GROUP;
  const __mmask16 mask = rows >= GROUP ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << rows) - 1);
  const F16 bias = out.bias ? _mm512_maskz_loadu_ps(mask, out.bias + g * GROUP) : _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i++) {
    const F16 sum = _mm512_loadu_ps(c + 16 * i);
    _mm512_mask_storeu_ps(out.y + (t + i) * out.ldy + g * GROUP, mask, out.bias ? _mm512_add_ps(sum, bias) : sum);
  }
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

template <Form F, int G>
void tile_any(const PanelBlock* panel, const QuantInput& qx, int64_t t, int64_t count, float* c) {
  const InputBlock<4>* x = four(qx, t);
  if (count == 1) tile<F, 1, G>(panel, qx.blocks, x, qx.blocks, c);
  else if (count == 2) tile<F, 2, G>(panel, qx.blocks, x, qx.blocks, c);
  else if (count == 3) tile<F, 3, G>(panel, qx.blocks, x, qx.blocks, c);
  else if (count == 4) tile<F, 4, G>(panel, qx.blocks, x, qx.blocks, c);
  else tile<F, 8, G>(panel, qx.blocks, x, qx.blocks, c);
}

// G groups from g on by tokens begin .. end - 1. Eight tokens a tile; six-bit forms, with two sums each, take four.
template <Form F, int G>
void panel_groups(const Packed& w, const QuantInput& qx, int64_t begin, int64_t end, int64_t g, PanelBlock* panel, const Out& out) {
  constexpr int64_t most = Traits<F>::six && G > 1 ? 4 : 8;
  alignas(64) float c[G * 8 * GROUP];
  for (int i = 0; i < G; i++) unpack<F>(w.data + (g + i) * w.group_bytes, qx.blocks, panel + i * qx.blocks);
  for (int64_t t = begin; t < end;) {
    const int64_t left = end - t, count = left >= most ? most : left > 4 ? 4 : left;
    tile_any<F, G>(panel, qx, t, count, c);
    for (int i = 0; i < G; i++) store_group(w, g + i, c + i * count * GROUP, t, count, out);
    t += count;
  }
}

template <Form F>
void quantized(const Packed& w, const QuantInput& qx, int64_t t_count, int64_t g0, int64_t g1, const Out& out) {
  void* memory = t_count > DIRECT ? thread_scratch(2 * qx.blocks * static_cast<int64_t>(sizeof(PanelBlock))) : nullptr;
  if (!memory) {  // few tokens, or no memory for a panel
    alignas(64) float c[4 * GROUP];
    for (int64_t g = g0; g < g1; g++)
      for (int64_t t = 0; t < t_count; t += 4) {
        const int64_t count = t_count - t < 4 ? t_count - t : 4;
        direct_any<F>(w.data + g * w.group_bytes, qx, t, count, c);
        store_group(w, g, c, t, count, out);
      }
    return;
  }
  PanelBlock* panel = static_cast<PanelBlock*>(memory);
  const int64_t fit = CHUNK_BYTES / (qx.blocks * static_cast<int64_t>(sizeof(InputBlock<4>))) * 4, chunk = fit < 96 ? 96 : fit;
  for (int64_t begin = 0; begin < t_count; begin += chunk) {
    const int64_t end = t_count - begin < chunk ? t_count : begin + chunk;
    int64_t g = g0;
    for (; g + 2 <= g1; g += 2) panel_groups<F, 2>(w, qx, begin, end, g, panel, out);
    if (g < g1) panel_groups<F, 1>(w, qx, begin, end, g, panel, out);
  }
}

// -- dense weights ----------------------------------------------------------------------------------------------------
// acc (R tokens, G groups) += input i (a pair of inputs for bf16) of G groups.
template <Form F, int R, int G>
inline void dense_step(F16 (&acc)[R][G], const uint8_t* p, int64_t stride, const float* x, int64_t ldx, bool pair) {
  for (int g = 0; g < G; g++) {
    const uint8_t* at = p + g * stride;
    F16 first, second;
    if constexpr (F == Form::f32) first = _mm512_loadu_ps(at);
    if constexpr (F == Form::f16) first = halves16(at);
    if constexpr (F == Form::bf16) {
      const I16 raw = load(at);
      first = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
      second = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
    for (int t = 0; t < R; t++) acc[t][g] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[t * ldx]), acc[t][g]);
    if constexpr (F == Form::bf16) {
      if (pair)
        for (int t = 0; t < R; t++) acc[t][g] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[t * ldx + 1]), acc[t][g]);
    }
  }
}

template <Form F, int R, int G>
void dense_groups(const Packed& w, const float* x, int64_t ldx, int64_t t, int64_t g, const Out& out) {
  constexpr Shape shape = shape_of(F);
  F16 acc[R][G];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < G; i++) acc[r][i] = _mm512_setzero_ps();
  const uint8_t* p = w.data + g * w.group_bytes;
  const float* in = x + t * ldx;
  int64_t i = 0;
  for (; i + shape.inputs <= w.k; i += shape.inputs, p += shape.codes) {
    if constexpr (R == 1) _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD / 4), _MM_HINT_T0);
    dense_step<F, R, G>(acc, p, w.group_bytes, in + i, ldx, true);
  }
  if (i < w.k) dense_step<F, R, G>(acc, p, w.group_bytes, in + i, ldx, false);
  alignas(64) float c[R * GROUP];
  for (int j = 0; j < G; j++) {
    for (int r = 0; r < R; r++) _mm512_store_ps(c + 16 * r, acc[r][j]);
    store_group(w, g + j, c, t, R, out);
  }
}

// G groups by all tokens.
template <Form F, int G>
void dense_tokens(const Packed& w, const float* x, int64_t ldx, int64_t t_count, int64_t g, const Out& out) {
  int64_t t = 0;
  for (; t + 8 <= t_count; t += 8) dense_groups<F, 8, G>(w, x, ldx, t, g, out);
  for (; t + 3 <= t_count; t += 3) dense_groups<F, 3, G>(w, x, ldx, t, g, out);
  if (t_count - t == 2) dense_groups<F, 2, G>(w, x, ldx, t, g, out);
  if (t_count - t == 1) dense_groups<F, 1, G>(w, x, ldx, t, g, out);
}

// One token takes six groups at a time: independent sums hide the latency of the fma.
template <Form F>
void dense(const Packed& w, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1, const Out& out) {
  int64_t g = g0;
  if (t_count == 1)
    for (; g + 6 <= g1; g += 6) dense_groups<F, 1, 6>(w, x, ldx, 0, g, out);
  for (; g + 2 <= g1; g += 2) dense_tokens<F, 2>(w, x, ldx, t_count, g, out);
  if (g < g1) dense_tokens<F, 1>(w, x, ldx, t_count, g, out);
}

void linear(const Packed& w, const QuantInput& qx, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1,
            float* y, int64_t ldy, const float* bias) {
  const Out out{y, ldy, bias};
  switch (w.form) {
    case Form::q4_0: return quantized<Form::q4_0>(w, qx, t_count, g0, g1, out);
    case Form::q4_w: return;  // the AVX2 path's
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

// As `linear`, with bfloat16 weights left to VDPBF16PS.
void linear_with_bf16(const Packed& w, const QuantInput& qx, const float* x, int64_t ldx, int64_t t_count, int64_t g0,
                      int64_t g1, float* y, int64_t ldy, const float* bias) {
#if !defined(SEPTET_NO_AVX512BF16)
  if (w.form == Form::bf16 && bf16_linear(w, x, ldx, t_count, g0, g1, y, ldy, bias)) return;
#endif
  linear(w, qx, x, ldx, t_count, g0, g1, y, ldy, bias);
}

// Quantising writes few bytes: AVX2's version serves, and gives the same bits.
constexpr Kernels AVX512 = {Path::avx512, avx2_quantize, linear};
constexpr Kernels AVX512_BF16 = {Path::avx512, avx2_quantize, linear_with_bf16};

}  // namespace

const Kernels* avx512_kernels(bool bf16) { return bf16 ? &AVX512_BF16 : &AVX512; }

}  // namespace septet

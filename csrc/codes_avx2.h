// How the AVX2 matrix kernels read weights: codes and scales of a block into registers, integer sums, their end in floats.
//
// Included by linear_avx2.cpp (weights decoded in registers) and panel_avx2.h (decoded once into scratch); in an anonymous
// namespace, compiled for AVX2 only. Knows no tokens beyond the block it is given.
//
// Exactness. VPMADDUBSW adds two products into int16 with saturation: codes of up to 6 bits give at most 2 * 63 * 127 =
// 16,002. Sums of these wrap modulo 2**16, which is harmless as long as the final sum fits: each accumulator starts at
// -offset * (sum of its inputs), so that it ends at the sum of (code - offset) * x over 16 inputs, at most 16 * 16 * 127 =
// 32,512 for 5 bits; 6-bit forms change scale after 16 inputs, hence 8 products of at most 32 * 127. Eight-bit weights take
// |w| and x with w's sign instead: 2 * 128 * 127 = 32,512, widened at once; in panels they are int16 (VPMADDWD).
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernel_tables.h"
#include "pack.h"

namespace septet {
namespace {

using F8 = __m256;
using I8 = __m256i;

// Kernels get their registers to themselves; a sum is kept where it is: left alone, GCC first makes all products of a block,
// spills them, and adds them up as a tree.
#define APART __attribute__((noinline))
#define KEEP(sum) __asm__("" : "+x"(sum))

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
  if constexpr (T::offset == 8) return {spread(&x.less8[t]), less};
  if constexpr (T::offset == 16) return {_mm256_slli_epi16(spread(&x.less8[t]), 1), less};
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
template <Form F, typename Input>
inline F8 finish(F8 acc, const Sums& sums, const Scales& scales, const Input& x, int t) {
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

}  // namespace
}  // namespace septet

// A vector of floats of the path that a file is compiled for, and the functions that all step kernels are written with.
//
// Included by step_portable.cpp (8 lanes, the compiler's own vectors), step_avx2.cpp (8) and step_avx512.cpp (16) with
// SEPTET_LANES set to 0, 8 or 16, so that attention_body.h and friends exist once. Everything is in an anonymous namespace:
// each file keeps its own copy, compiled for its own path (see cpu.h). Loads and stores are unaligned.
//
// NaN: larger(a, b) and smaller(a, b) return b where either is NaN, so put what must survive second.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#if SEPTET_LANES
#include <immintrin.h>
#endif

namespace septet {
namespace {

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of_bf16(uint16_t half) { return float_of_bits(static_cast<uint32_t>(half) << 16); }
inline uint16_t bf16_of_float(float value) {  // to nearest even; NaN stays NaN
  const uint32_t bits = bits_of_float(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if SEPTET_LANES == 16
constexpr int LANES = 16;
using F = __m512;
using I = __m512i;
using M = __mmask16;
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F spread(float x) { return _mm512_set1_ps(x); }
inline I spread_int(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F over(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F larger(F a, F b) { return _mm512_max_ps(a, b); }
inline F smaller(F a, F b) { return _mm512_min_ps(a, b); }
inline F nearest(F x) { return _mm512_roundscale_ps(x, 0); }
inline F times_power(F x, F n) { return _mm512_scalef_ps(x, n); }
inline M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline F pick(M mask, F yes, F no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline bool any(M mask) { return mask != 0; }
inline bool any_nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
inline float total(F x) { return _mm512_reduce_add_ps(x); }
inline void totals(F a, F b, F c, F d, float* out) {  // the sums of four vectors, side by side
  const auto half = [](F x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
inline float largest(F x) { return _mm512_reduce_max_ps(x); }
inline I bits(F x) { return _mm512_castps_si512(x); }
inline F of_bits(I x) { return _mm512_castsi512_ps(x); }
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
inline I load_int(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I xor_int(I a, I b) { return _mm512_xor_si512(a, b); }
inline I and_int(I a, I b) { return _mm512_and_si512(a, b); }
inline I or_int(I a, I b) { return _mm512_or_si512(a, b); }
template <int S> inline I right(I x) { return _mm512_srli_epi32(x, S); }
inline F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_half(uint16_t* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0)); }
inline F load_bf16(const uint16_t* p) {
  return of_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline float half_float(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }
inline uint16_t float_half(float x) { return static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0)); }

#elif SEPTET_LANES == 8
constexpr int LANES = 8;
using F = __m256;
using I = __m256i;
using M = __m256;
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F spread(float x) { return _mm256_set1_ps(x); }
inline I spread_int(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F over(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F larger(F a, F b) { return _mm256_max_ps(a, b); }
inline F smaller(F a, F b) { return _mm256_min_ps(a, b); }
inline F nearest(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F times_power(F x, F n) {  // n whole, -126 .. 127; x near 1
  const I exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}
inline M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline M at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline F pick(M mask, F yes, F no) { return _mm256_blendv_ps(no, yes, mask); }
inline bool any(M mask) { return _mm256_movemask_ps(mask) != 0; }
inline bool any_nan(F x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
inline float total(F x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void totals(F a, F b, F c, F d, float* out) {  // the sums of four vectors, side by side
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
inline float largest(F x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline I bits(F x) { return _mm256_castps_si256(x); }
inline F of_bits(I x) { return _mm256_castsi256_ps(x); }
inline F to_float(I x) { return _mm256_cvtepi32_ps(x); }
inline I load_int(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
inline I sub_int(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I mul_int(I a, I b) { return _mm256_mullo_epi32(a, b); }
inline I xor_int(I a, I b) { return _mm256_xor_si256(a, b); }
inline I and_int(I a, I b) { return _mm256_and_si256(a, b); }
inline I or_int(I a, I b) { return _mm256_or_si256(a, b); }
template <int S> inline I right(I x) { return _mm256_srli_epi32(x, S); }
inline F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_half(uint16_t* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0)); }
inline F load_bf16(const uint16_t* p) {
  return of_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline float half_float(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }
inline uint16_t float_half(float x) { return static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0)); }

#else
constexpr int LANES = 8;
struct F {
  float v[8];
};
struct I {
  uint32_t v[8];
};
struct M {
  bool v[8];
};
#define EACH for (int i = 0; i < 8; i++)
inline F load(const float* p) { F r; memcpy(r.v, p, sizeof r.v); return r; }
inline void store(float* p, F x) { memcpy(p, x.v, sizeof x.v); }
inline F spread(float x) { F r; EACH r.v[i] = x; return r; }
inline I spread_int(uint32_t x) { I r; EACH r.v[i] = x; return r; }
inline F add(F a, F b) { EACH a.v[i] += b.v[i]; return a; }
inline F sub(F a, F b) { EACH a.v[i] -= b.v[i]; return a; }
inline F mul(F a, F b) { EACH a.v[i] *= b.v[i]; return a; }
inline F over(F a, F b) { EACH a.v[i] /= b.v[i]; return a; }
inline F fma(F a, F b, F c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }  // rounded twice: no FMA to be had
inline F larger(F a, F b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F smaller(F a, F b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F nearest(F x) { EACH x.v[i] = rintf(x.v[i]); return x; }
inline F times_power(F x, F n) {  // n whole, -126 .. 127; x near 1
  EACH x.v[i] = float_of_bits(bits_of_float(x.v[i]) + (static_cast<uint32_t>(n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0) << 23));
  return x;
}
inline M less(F a, F b) { M r; EACH r.v[i] = a.v[i] < b.v[i]; return r; }
inline M at_least(F a, F b) { M r; EACH r.v[i] = a.v[i] >= b.v[i]; return r; }
inline F pick(M mask, F yes, F no) { EACH no.v[i] = mask.v[i] ? yes.v[i] : no.v[i]; return no; }
inline bool any(M mask) { bool r = false; EACH r |= mask.v[i]; return r; }
inline bool any_nan(F x) { bool r = false; EACH r |= x.v[i] != x.v[i]; return r; }
inline float total(F x) { return (x.v[0] + x.v[4] + (x.v[2] + x.v[6])) + (x.v[1] + x.v[5] + (x.v[3] + x.v[7])); }
inline void totals(F a, F b, F c, F d, float* out) {  // the sums of four vectors, side by side
  out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
}
inline float largest(F x) { float r = x.v[0]; EACH r = r > x.v[i] ? r : x.v[i]; return r; }
inline I bits(F x) { I r; memcpy(r.v, x.v, sizeof r.v); return r; }
inline F of_bits(I x) { F r; memcpy(r.v, x.v, sizeof r.v); return r; }
inline F to_float(I x) { F r; EACH r.v[i] = static_cast<float>(static_cast<int32_t>(x.v[i])); return r; }
inline I load_int(const uint32_t* p) { I r; memcpy(r.v, p, sizeof r.v); return r; }
inline I add_int(I a, I b) { EACH a.v[i] += b.v[i]; return a; }
inline I sub_int(I a, I b) { EACH a.v[i] -= b.v[i]; return a; }
inline I mul_int(I a, I b) { EACH a.v[i] *= b.v[i]; return a; }
inline I xor_int(I a, I b) { EACH a.v[i] ^= b.v[i]; return a; }
inline I and_int(I a, I b) { EACH a.v[i] &= b.v[i]; return a; }
inline I or_int(I a, I b) { EACH a.v[i] |= b.v[i]; return a; }
template <int S> inline I right(I x) { EACH x.v[i] >>= S; return x; }
inline float half_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline uint16_t float_half(float x) {  // to nearest even, as VCVTPS2PH
  const uint32_t all = bits_of_float(x), sign = all >> 16 & 0x8000, rest = all & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 65,536 and beyond: infinity
  if (rest < 0x38800000) {                                             // below the smallest normal half
    const float scaled = float_of_bits(rest) * 0x1p24f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(rintf(scaled)));
  }
  return static_cast<uint16_t>(sign | ((rest + 0xfff + (rest >> 13 & 1)) - 0x38000000) >> 13);
}
inline F load_half(const uint16_t* p) { F r; EACH r.v[i] = half_float(p[i]); return r; }
inline void store_half(uint16_t* p, F x) { EACH p[i] = float_half(x.v[i]); }
inline F load_bf16(const uint16_t* p) { F r; EACH r.v[i] = float_of_bf16(p[i]); return r; }
#undef EACH
#endif

inline F zero() { return spread(0.0f); }

// The first n (< LANES) of a vector; the rest reads as zero and is not written.
inline F load_first(const float* p, int64_t n) {
  float all[LANES] = {};
  memcpy(all, p, static_cast<size_t>(n) * 4);
  return load(all);
}
inline void store_first(float* p, int64_t n, F x) {
  float all[LANES];
  store(all, x);
  memcpy(p, all, static_cast<size_t>(n) * 4);
}

// e^x: 0 below -87.3, at most 2.3e38 from 88.3 on, NaN for NaN; elsewhere within 1.5 units in the last place.
// Cody-Waite reduction by ln 2 and a polynomial of degree 6 (coefficients: Cephes, expf).
inline F exponential(F x) {
  const F clamped = larger(spread(-87.3f), smaller(spread(88.37f), x));
  const F n = nearest(mul(clamped, spread(1.44269504088896341f)));
  const F r = fma(n, spread(2.12194440e-4f), fma(n, spread(-0.693359375f), clamped));
  F p = spread(1.9875691500e-4f);
  p = fma(p, r, spread(1.3981999507e-3f));
  p = fma(p, r, spread(8.3334519073e-3f));
  p = fma(p, r, spread(4.1665795894e-2f));
  p = fma(p, r, spread(1.6666665459e-1f));
  p = fma(p, r, spread(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), spread(1.0f));
  return pick(less(x, spread(-87.3f)), zero(), times_power(p, n));
}

// ln x for normal x > 0 (Cephes, logf): within 1.5 units in the last place.
inline F logarithm(F x) {
  const I all = bits(x);
  F e = to_float(sub_int(right<23>(all), spread_int(126)));
  F m = of_bits(or_int(and_int(all, spread_int(0x007fffff)), spread_int(0x3f000000)));  // 0.5 .. 1
  const M low = less(m, spread(0.707106781186547524f));
  e = pick(low, sub(e, spread(1.0f)), e);
  m = sub(pick(low, add(m, m), m), spread(1.0f));
  const F z = mul(m, m);
  F p = spread(7.0376836292e-2f);
  p = fma(p, m, spread(-1.1514610310e-1f));
  p = fma(p, m, spread(1.1676998740e-1f));
  p = fma(p, m, spread(-1.2420140846e-1f));
  p = fma(p, m, spread(1.4249322787e-1f));
  p = fma(p, m, spread(-1.6668057665e-1f));
  p = fma(p, m, spread(2.0000714765e-1f));
  p = fma(p, m, spread(-2.4999993993e-1f));
  p = fma(p, m, spread(3.3333331174e-1f));
  F y = mul(mul(p, m), z);
  y = fma(e, spread(-2.12194440e-4f), y);
  y = fma(z, spread(-0.5f), y);
  return fma(e, spread(0.693359375f), add(m, y));
}

inline F tanh_of(F x) {  // 1 - 2 / (e^2x + 1)
  return sub(spread(1.0f), over(spread(2.0f), add(exponential(add(x, x)), spread(1.0f))));
}

}  // namespace
}  // namespace septet

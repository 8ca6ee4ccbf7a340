// AVX-512 in plain C++, for tests of the avx512 path's results on machines without it. Never part of a real build.
//
// `python csrc/build.py --emulate-avx512 OUTPUT` puts this file before each *_avx512*.cpp. It replaces the types and the
// intrinsics that those files use, one by one, by their definitions in Intel's Intrinsics Guide; an intrinsic that is
// missing here fails to compile. Scalar and slow.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

struct alignas(64) EmulatedF {
  float v[16];
};
struct alignas(64) EmulatedI {
  int32_t v[16];
};
struct alignas(64) EmulatedBH {
  uint16_t v[32];
};
struct alignas(32) EmulatedHalfBH {
  uint16_t v[16];
};

namespace emulated {

template <typename To, typename From>
static inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <typename T>
static inline T read(const void* p) {
  T out;
  memcpy(&out, p, sizeof out);
  return out;
}
template <typename F>
static inline EmulatedF floats(F f) {
  EmulatedF out;
  for (int i = 0; i < 16; i++) out.v[i] = f(i);
  return out;
}
template <typename F>
static inline EmulatedI words(F f) {
  EmulatedI out;
  for (int i = 0; i < 16; i++) out.v[i] = static_cast<int32_t>(f(i));
  return out;
}
// 64 or 32 narrow lanes of a register.
template <typename T>
struct Lanes {
  T v[64 / sizeof(T)];
};
template <typename T, typename F>
static inline EmulatedI lanes(F f) {
  Lanes<T> out;
  for (unsigned i = 0; i < 64 / sizeof(T); i++) out.v[i] = static_cast<T>(f(static_cast<int>(i)));
  return bits<EmulatedI>(out);
}
static inline uint32_t u(int32_t v) { return static_cast<uint32_t>(v); }
static inline float bf16(uint16_t v) { return bits<float>(static_cast<uint32_t>(v) << 16); }
static inline float flush(float v) { return fabsf(v) < 0x1p-126f ? copysignf(0.0f, v) : v; }

static inline EmulatedI dpbusd(EmulatedI a, EmulatedI b, EmulatedI c) {
  const auto x = bits<Lanes<uint8_t>>(b);
  const auto y = bits<Lanes<int8_t>>(c);
  for (int i = 0; i < 64; i++) a.v[i / 4] += x.v[i] * y.v[i];
  return a;
}
static inline EmulatedI madd16(EmulatedI a, EmulatedI b) {
  const auto x = bits<Lanes<int16_t>>(a), y = bits<Lanes<int16_t>>(b);
  return words([&](int i) { return x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1]; });
}
template <typename F>
static inline EmulatedF two(F f, EmulatedF a, EmulatedF b) {
  return floats([&](int i) { return f(a.v[i], b.v[i]); });
}
template <typename F>
static inline EmulatedI two(F f, EmulatedI a, EmulatedI b) {
  return words([&](int i) { return f(u(a.v[i]), u(b.v[i])); });
}
template <typename F>
static inline EmulatedF three(F f, EmulatedF a, EmulatedF b, EmulatedF c) {
  return floats([&](int i) { return f(a.v[i], b.v[i], c.v[i]); });
}
static inline EmulatedF to_float(EmulatedI a) {
  return floats([&](int i) { return static_cast<float>(a.v[i]); });
}
static inline void store_words(void* p, EmulatedI a) { memcpy(p, &a, sizeof a); }
static inline __m256i to_half(EmulatedF a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(_mm256_loadu_ps(a.v + 8), 0), _mm256_cvtps_ph(_mm256_loadu_ps(a.v), 0));
}
static inline EmulatedI shift16(EmulatedI a, int left) {
  const auto x = bits<Lanes<uint16_t>>(a);
  return lanes<uint16_t>([&](int i) { return left >= 0 ? x.v[i] << left : x.v[i] >> -left; });
}
static inline EmulatedF from_half(__m256i a) {
  EmulatedF out;
  _mm256_storeu_ps(out.v, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
  _mm256_storeu_ps(out.v + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
  return out;
}
static inline EmulatedI widen16(__m256i a, bool sign) {
  const auto s = bits<EmulatedHalfBH>(a);
  return words([&](int i) { return sign ? static_cast<int16_t>(s.v[i]) : static_cast<int32_t>(s.v[i]); });
}
static inline EmulatedI widen8(__m128i a) {
  uint8_t s[16];
  memcpy(s, &a, 16);
  return words([&](int i) { return s[i]; });
}
static inline EmulatedF load_masked(uint16_t mask, const float* p) {
  return floats([&](int i) { return mask >> i & 1 ? p[i] : 0.0f; });
}
static inline void store_masked(float* p, uint16_t mask, EmulatedF a) {
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) p[i] = a.v[i];
}
static inline EmulatedHalfBH round_bf16(EmulatedF a) {
  EmulatedHalfBH out;
  for (int i = 0; i < 16; i++) {
    const uint32_t b = bits<uint32_t>(flush(a.v[i]));
    out.v[i] = static_cast<uint16_t>(a.v[i] != a.v[i] ? b >> 16 | 64 : (b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
  return out;
}
static inline EmulatedF dpbf16(EmulatedF acc, EmulatedBH a, EmulatedBH b) {
  for (int i = 0; i < 16; i++)
    for (int j = 1; j >= 0; j--) acc.v[i] = flush(fmaf(flush(bf16(a.v[2 * i + j])), flush(bf16(b.v[2 * i + j])), acc.v[i]));
  return acc;
}
static inline void store16_masked(void* p, uint16_t mask, __m256i a) {
  const auto s = bits<EmulatedHalfBH>(a);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy(static_cast<char*>(p) + 2 * i, &s.v[i], 2);
}
static inline float nearest(float x, int) { return rintf(x); }
static inline float scaled(float x, float n) { return ldexpf(x, n == n ? static_cast<int>(floorf(n)) : 0) + (n == n ? 0.0f : n); }
// Predicates that our kernels use: less and at least (false for NaN), unordered.
static inline __mmask16 compare(EmulatedF a, EmulatedF b, int predicate) {
  int mask = 0;
  for (int i = 0; i < 16; i++) {
    const float x = a.v[i], y = b.v[i];
    const bool yes = predicate == _CMP_LT_OQ ? x < y : predicate == _CMP_GE_OQ ? x >= y : x != x || y != y;
    mask |= yes << i;
  }
  return static_cast<__mmask16>(mask);
}
static inline EmulatedF blend(__mmask16 mask, EmulatedF no, EmulatedF yes) {
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) no.v[i] = yes.v[i];
  return no;
}
// In halves, as GCC's and Clang's sequences do.
template <typename Op>
static inline float reduce(const Op& op, EmulatedF a) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) a.v[i] = op(a.v[i], a.v[i + n]);
  return a.v[0];
}
static inline __m256 half_of(EmulatedF a, int which) { return read<__m256>(a.v + 8 * which); }

}  // namespace emulated

#define __m512 EmulatedF
#define __m512i EmulatedI
#define __m512bh EmulatedBH
#define __m256bh EmulatedHalfBH
#define _mm512_setzero_ps() emulated::floats([](int) { return 0.0f; })
#define _mm512_setzero_si512() emulated::words([](int) { return 0; })
#define _mm512_set1_ps(x) emulated::floats([&](int) { return (x); })
#define _mm512_set1_epi32(x) emulated::words([&](int) { return (x); })
#define _mm512_set1_epi8(x) emulated::lanes<int8_t>([&](int) { return (x); })
#define _mm512_loadu_ps(p) emulated::read<EmulatedF>(p)
#define _mm512_load_ps(p) emulated::read<EmulatedF>(p)
#define _mm512_loadu_si512(p) emulated::read<EmulatedI>(p)
#define _mm512_maskz_loadu_ps(m, p) emulated::load_masked(m, p)
#define _mm512_storeu_ps(p, a) emulated::store_masked(p, 0xffff, a)
#define _mm512_store_ps(p, a) emulated::store_masked(p, 0xffff, a)
#define _mm512_mask_storeu_ps(p, m, a) emulated::store_masked(p, m, a)
#define _mm512_store_si512(p, a) emulated::store_words(p, a)
#define _mm256_mask_storeu_epi16(p, m, a) emulated::store16_masked(p, m, a)
#define _mm512_roundscale_ps(a, imm) emulated::two([](float x, float) { return emulated::nearest(x, imm); }, a, a)
#define _mm512_scalef_ps(a, b) emulated::two([](float x, float n) { return emulated::scaled(x, n); }, a, b)
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::compare(a, b, predicate)
#define _mm512_mask_blend_ps(mask, no, yes) emulated::blend(mask, no, yes)
#define _mm512_reduce_add_ps(a) emulated::reduce([](float x, float y) { return x + y; }, a)
#define _mm512_reduce_max_ps(a) emulated::reduce([](float x, float y) { return x > y ? x : y; }, a)
#define _mm512_castps512_ps256(a) emulated::half_of(a, 0)
#define _mm512_extractf32x8_ps(a, which) emulated::half_of(a, which)
#define _mm512_castsi512_ps(a) emulated::bits<EmulatedF>(a)
#define _mm512_castps_si512(a) emulated::bits<EmulatedI>(a)
#define _mm512_add_ps(a, b) emulated::two([](float x, float y) { return x + y; }, a, b)
#define _mm512_sub_ps(a, b) emulated::two([](float x, float y) { return x - y; }, a, b)
#define _mm512_mul_ps(a, b) emulated::two([](float x, float y) { return x * y; }, a, b)
#define _mm512_div_ps(a, b) emulated::two([](float x, float y) { return x / y; }, a, b)
#define _mm512_max_ps(a, b) emulated::two([](float x, float y) { return x > y ? x : y; }, a, b)
#define _mm512_min_ps(a, b) emulated::two([](float x, float y) { return x < y ? x : y; }, a, b)
#define _mm512_fmadd_ps(a, b, c) emulated::three([](float x, float y, float z) { return fmaf(x, y, z); }, a, b, c)
#define _mm512_fnmadd_ps(a, b, c) emulated::three([](float x, float y, float z) { return fmaf(-x, y, z); }, a, b, c)
#define _mm512_add_epi32(a, b) emulated::two([](uint32_t x, uint32_t y) { return x + y; }, a, b)
#define _mm512_sub_epi32(a, b) emulated::two([](uint32_t x, uint32_t y) { return x - y; }, a, b)
#define _mm512_mullo_epi32(a, b) emulated::two([](uint32_t x, uint32_t y) { return x * y; }, a, b)
#define _mm512_and_si512(a, b) emulated::two([](uint32_t x, uint32_t y) { return x & y; }, a, b)
#define _mm512_or_si512(a, b) emulated::two([](uint32_t x, uint32_t y) { return x | y; }, a, b)
#define _mm512_xor_si512(a, b) emulated::two([](uint32_t x, uint32_t y) { return x ^ y; }, a, b)
#define _mm512_slli_epi32(a, n) emulated::two([&](uint32_t x, uint32_t) { return x << (n); }, a, a)
#define _mm512_srli_epi32(a, n) emulated::two([&](uint32_t x, uint32_t) { return x >> (n); }, a, a)
#define _mm512_srai_epi32(a, n) emulated::two([&](uint32_t x, uint32_t) { return static_cast<int32_t>(x) >> (n); }, a, a)
#define _mm512_slli_epi16(a, n) emulated::shift16(a, n)
#define _mm512_srli_epi16(a, n) emulated::shift16(a, -(n))
#define _mm512_madd_epi16(a, b) emulated::madd16(a, b)
#define _mm512_dpbusd_epi32(a, b, c) emulated::dpbusd(a, b, c)
#define _mm512_cvtph_ps(a) emulated::from_half(a)
#define _mm512_cvtps_ph(a, rounding) emulated::to_half(a)
#define _mm512_cvtepi32_ps(a) emulated::to_float(a)
#define _mm512_cvtepi16_epi32(a) emulated::widen16(a, true)
#define _mm512_cvtepu16_epi32(a) emulated::widen16(a, false)
#define _mm512_cvtepu8_epi32(a) emulated::widen8(a)
#define _mm512_cvtneps_pbh(a) emulated::round_bf16(a)
#define _mm512_dpbf16_ps(acc, a, b) emulated::dpbf16(acc, a, b)

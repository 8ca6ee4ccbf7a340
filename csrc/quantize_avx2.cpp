// Activations to int8 on the AVX2 and AVX-512 paths; see QuantInput in linear.h and InputBlock in kernel_tables.h.
#include <immintrin.h>
#include <string.h>

#include "kernel_tables.h"
#include "linear.h"

namespace septet {
namespace {

using F8 = __m256;
using I8 = __m256i;

constexpr float TINY = 1e-30f;  // a block of smaller numbers counts as zero: 127 / it could overflow

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
  to.less8[t] = _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(both, 3)));
  to.half[0][t] = _mm256_cvtsi256_si32(lanes);
  to.half[1][t] = _mm256_extract_epi32(lanes, 4);
}

// N (1 or 2) blocks, of one scale.
template <int N>
void quantize_blocks(const float* x, int64_t t, int64_t b, QuantInput& out) {
  F8 in[N][4], most = _mm256_setzero_ps(), poison = _mm256_setzero_ps();
  for (int i = 0; i < 4 * N; i++) {
    const F8 next = in[i / 4][i % 4] = _mm256_loadu_ps(x + 8 * i);
    most = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), next), most);
    poison = _mm256_fmadd_ps(next, _mm256_setzero_ps(), poison);  // NaN where x is not finite
  }
  const float peak = biggest(most), bad = total(poison);
  const bool zero = peak < TINY || bad != bad;
  const F8 inverse = _mm256_set1_ps(zero ? 0.0f : 127.0f / peak);
  const float d = (zero ? 0.0f : peak / 127.0f) + bad;
  for (int i = 0; i < N; i++) {
    const I8 q = to_bytes(in[i], inverse);
    if (out.lanes == 1) lay_out(reinterpret_cast<InputBlock<1>*>(out.data)[t * out.blocks + b + i], 0, q, d);
    else lay_out(reinterpret_cast<InputBlock<4>*>(out.data)[t / 4 * out.blocks + b + i], static_cast<int>(t % 4), q, d);
  }
}

}  // namespace

void avx2_quantize(const float* x, int64_t ldx, int64_t k, int64_t t0, int64_t t1, QuantInput& out) {
  const int64_t whole = k / (2 * BLOCK), left = k % (2 * BLOCK);
  for (int64_t t = t0; t < t1; t++) {
    for (int64_t b = 0; b < 2 * whole; b += 2) quantize_blocks<2>(x + t * ldx + b * BLOCK, t, b, out);
    if (left == 0) continue;
    float rest[2 * BLOCK] = {};
    memcpy(rest, x + t * ldx + 2 * whole * BLOCK, static_cast<size_t>(left) * sizeof(float));
    if (left > BLOCK) quantize_blocks<2>(rest, t, 2 * whole, out);
    else quantize_blocks<1>(rest, t, 2 * whole, out);
  }
}

}  // namespace septet

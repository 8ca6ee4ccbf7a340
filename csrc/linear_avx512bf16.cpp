// Dense bfloat16 weights through VDPBF16PS (Cooper Lake, Sapphire Rapids, Zen 4 and later): twice the rate of fp32 fma.
//
// Inputs are rounded to bfloat16 first (nearest even), as torch does when it computes in bfloat16; sums are float32, two
// products at a time. Denormal inputs count as zero (the instruction's own rule). A token's result does not depend on its
// neighbours: one sum per output, inputs in order.
#include <immintrin.h>
#include <string.h>

#include "kernel_tables.h"
#include "linear.h"

namespace septet {
namespace {

constexpr int64_t TOKENS = 96;  // rounded to bfloat16 at a time: 96 x 4096 inputs fill 768 KB

struct Job {
  const Packed& w;
  const uint16_t* x;  // (tokens, k_even) bfloat16
  int64_t k_even;     // k rounded up to 2
  float* y;           // of the first token
  int64_t ldy;
  const float* bias;
};

void round_rows(const float* x, int64_t ldx, int64_t k, int64_t k_even, int64_t count, uint16_t* out) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < k_even; i += 16) {
      const __mmask16 in = k - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (k - i)) - 1);
      const __mmask16 written = k_even - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (k_even - i)) - 1);
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(in, x + t * ldx + i));
      __m256i bits;
      memcpy(&bits, &rounded, sizeof bits);
      _mm256_mask_storeu_epi16(out + t * k_even + i, written, bits);
    }
}

inline __m512bh as_bf16(__m512i bits) {
  __m512bh out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

// G groups from g on by R tokens from t on.
template <int R, int G>
void tile(const Job& job, int64_t t, int64_t g) {
  __m512 acc[R][G];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < G; i++) acc[r][i] = _mm512_setzero_ps();
  const uint8_t* p = job.w.data + g * job.w.group_bytes;
  const uint16_t* x = job.x + t * job.k_even;
  for (int64_t i = 0; i < job.k_even; i += 2, p += 64) {
    if constexpr (R == 1) _mm_prefetch(reinterpret_cast<const char*>(p + 1024), _MM_HINT_T0);
    __m512bh w[G];
    for (int j = 0; j < G; j++) w[j] = as_bf16(_mm512_loadu_si512(p + j * job.w.group_bytes));
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, x + r * job.k_even + i, 4);
      const __m512bh in = as_bf16(_mm512_set1_epi32(pair));
      for (int j = 0; j < G; j++) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], w[j], in);
    }
  }
  for (int j = 0; j < G; j++) {
    const int64_t row = (g + j) * GROUP, rows = job.w.n - row;
    const __mmask16 mask = rows >= GROUP ? 0xffff : static_cast<__mmask16>((1u << rows) - 1);
    const __m512 bias = job.bias ? _mm512_maskz_loadu_ps(mask, job.bias + row) : _mm512_setzero_ps();
    for (int r = 0; r < R; r++)
      _mm512_mask_storeu_ps(job.y + (t + r) * job.ldy + row, mask, job.bias ? _mm512_add_ps(acc[r][j], bias) : acc[r][j]);
  }
}

template <int G>
void all_tokens(const Job& job, int64_t count, int64_t g) {
  int64_t t = 0;
  for (; t + 12 <= count; t += 12) tile<12, G>(job, t, g);
  for (; t + 4 <= count; t += 4) tile<4, G>(job, t, g);
  if (count - t == 3) tile<3, G>(job, t, g);
  else if (count - t == 2) tile<2, G>(job, t, g);
  else if (count - t == 1) tile<1, G>(job, t, g);
}

}  // namespace

bool bf16_linear(const Packed& w, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1, float* y, int64_t ldy,
                 const float* bias) {
  const int64_t k_even = w.k + w.k % 2;
  const int64_t most = t_count < TOKENS ? t_count : TOKENS;
  uint16_t* rounded = static_cast<uint16_t*>(thread_scratch(most * k_even * 2));
  if (!rounded) return false;
  for (int64_t t = 0; t < t_count; t += TOKENS) {
    const int64_t count = t_count - t < TOKENS ? t_count - t : TOKENS;
    round_rows(x + t * ldx, ldx, w.k, k_even, count, rounded);
    const Job job{w, rounded, k_even, y + t * ldy, ldy, bias};
    int64_t g = g0;
    if (count == 1)
      for (; g + 6 <= g1; g += 6) tile<1, 6>(job, 0, g);
    for (; g + 2 <= g1; g += 2) all_tokens<2>(job, count, g);
    if (g < g1) all_tokens<1>(job, count, g);
  }
  return true;
}

}  // namespace septet

// Where the AVX2 matrix kernels put their results. Included by linear_avx2.cpp and dense_avx2.cpp.
#pragma once

#include <immintrin.h>

#include "linear.h"

namespace septet {
namespace {

// c (count, 16) -> y rows, plus bias. `rows` < 16 in the last group only.
void store(const float* c, int64_t count, int64_t rows, float* y, int64_t ldy, const float* bias) {
  for (int64_t t = 0; t < count; t++) {
    const float* in = c + 16 * t;
    float* out = y + t * ldy;
    if (rows == GROUP) {
      __m256 low = _mm256_loadu_ps(in), high = _mm256_loadu_ps(in + 8);
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

// Outputs that a tile is about to make: their stores would wait for memory, and those of the tile's sums behind them.
inline void ask_for(int64_t g, int64_t t, int64_t count, const Out& out) {
  for (int64_t i = 0; i < count; i++) __builtin_prefetch(out.y + (t + i) * out.ldy + g * GROUP, 1);
}

}  // namespace
}  // namespace septet

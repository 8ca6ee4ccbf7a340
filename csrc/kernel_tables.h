// What the files of the matrix kernels share among themselves: each path's table, and small helpers without templates.
#pragma once

#include "linear.h"

namespace septet {

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels(bool bf16);  // bf16: dense bfloat16 weights through VDPBF16PS (inputs rounded to bfloat16)

// quantize_avx2.cpp and dense_avx2.cpp: Kernels::quantize_rows, and linear_part for dense weights.
void avx2_quantize(const float* x, int64_t ldx, int64_t k, int64_t t0, int64_t t1, QuantInput& out);
void avx2_dense(const Packed& w, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1, float* y, int64_t ldy,
                const float* bias);

// linear_avx512bf16.cpp: as linear_part, for bf16 weights only. False: no scratch memory, nothing is written.
bool bf16_linear(const Packed& w, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1, float* y, int64_t ldy,
                 const float* bias);

// 32 inputs of LANES tokens, quantised. All that a kernel reads of a block lies at constant offsets from one pointer.
// Blocks of tokens LANES * i .. LANES * i + LANES - 1 follow each other, then those of the next tokens.
template <int LANES>
struct InputBlock {
  int8_t q[8][LANES][4];   // [line][token]: inputs 4 line .. 4 line + 3
  float d[LANES];
  float ds[LANES];         // d * sum of q
  int32_t sum[LANES];      // sum of q over the 32 inputs
  int32_t less8[LANES];    // two int16: -8 times the sum of q at inputs 0, 1 modulo 4 (low half) and at 2, 3 modulo 4 (high)
  int32_t half[2][LANES];  // two int16, for inputs 0-15 and 16-31: the sums themselves
};

// One token's block before it is laid out. `half`: see InputBlock.
struct QuantBlock {
  int8_t q[32];
  float d;
  int32_t half[2];
};

}  // namespace septet

// What the files of the matrix kernels share among themselves: each path's table, and small helpers without templates.
#pragma once

#include "linear.h"

namespace septet {

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels(bool bf16);  // bf16: dense bfloat16 weights through VDPBF16PS (inputs rounded to bfloat16)

// linear_avx512bf16.cpp: as linear_part, for bf16 weights only. False: no scratch memory, nothing is written.
bool bf16_linear(const Packed& w, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1, float* y, int64_t ldy,
                 const float* bias);

// The same input from token t on.
static inline QuantInput quant_from(const QuantInput& in, int64_t t) {
  QuantInput out = in;
  out.q += t * in.k_pad;
  out.d += t * in.blocks;
  out.ds += t * in.blocks;
  out.sum += t * in.blocks;
  out.pair += t * in.blocks;
  out.halves += 2 * t * in.blocks;
  return out;
}

}  // namespace septet

// The step kernels of the avx2 path; see step_kernels.h.
#define SEPTET_LANES 8
#include "attention_body.h"
#include "elementwise_body.h"
#include "sampling_body.h"

namespace septet {
namespace {

constexpr StepKernels TABLE = {Path::avx2, rms_norm, add_rows, scale_row, gated, soft_cap, rotate, to_pool,
                               scratch_one, scratch_tile, attend_one, attend_tile, merge, argmax, gumbel_argmax, exps};

}  // namespace

const StepKernels* step_kernels_avx2() { return &TABLE; }

}  // namespace septet

// The step kernels of the portable path; see step_kernels.h.
#define SEPTET_LANES 0
#include "attention_body.h"
#include "elementwise_body.h"
#include "sampling_body.h"

namespace septet {
namespace {

constexpr StepKernels TABLE = {Path::portable, rms_norm, add_rows, scale_row, gated, soft_cap, rotate, to_pool,
                               scratch_one, scratch_tile, attend_one, attend_tile, merge, argmax, gumbel_argmax, exps};

}  // namespace

const StepKernels* step_kernels_portable() { return &TABLE; }

}  // namespace septet

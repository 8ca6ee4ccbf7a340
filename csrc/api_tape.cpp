// The C interface of the tape and of choosing tokens. Called by septet/kernels/native/. See api.h and tape.h.
#include <stdlib.h>

#include "api.h"
#include "tape.h"

using namespace septet;

// A tape over a pool, which must outlive it; null: the path is not available here, or out of memory.
SEPTET_API void* septet_tape_create(void* pool, const Program* program) {
  try {
    if (!step_kernels_for(static_cast<Path>(program->path)) || !kernels_for(static_cast<Path>(program->path))) return nullptr;
    return new Tape(*program, *static_cast<Pool*>(pool));
  } catch (...) {
    return nullptr;
  }
}
SEPTET_API void septet_tape_release(void* tape) { delete static_cast<Tape*>(tape); }

// See Tape::run for the status.
SEPTET_API int septet_tape_run(void* tape, const Step* step, int parts) {
  try {
    return static_cast<Tape*>(tape)->run(*step, parts);
  } catch (...) {
    return -1;
  }
}
SEPTET_API const float* septet_tape_hidden(const void* tape) { return static_cast<const Tape*>(tape)->hidden_states(); }

// Sizes of the structures that Python fills, to be compared with its own before anything else is called.
SEPTET_API void septet_tape_sizes(int64_t* sizes) {
  const int64_t all[] = {sizeof(Register), sizeof(RowOp), sizeof(Product), sizeof(Attention), sizeof(Phase), sizeof(LayerPool), sizeof(Program), sizeof(Step)};
  for (int i = 0; i < 8; i++) sizes[i] = all[i];
}

// logits (count, n) float32, row stride ld; out (count). See Ops.argmax and Ops.gumbel_argmax.
SEPTET_API int septet_argmax(void* pool, int path, const float* logits, int64_t count, int64_t n, int64_t ld, int64_t* out) {
  const StepKernels* kernels = step_kernels_for(static_cast<Path>(path));
  if (!kernels) return -1;
  Pool& threads = *static_cast<Pool*>(pool);
  const auto part = [&](int thread, int parts) {
    const Range rows = share(count, thread, parts);
    for (int64_t r = rows.first; r < rows.last; r++) out[r] = kernels->argmax(logits + r * ld, n);
  };
  if (count == 1) part(0, 1);
  else threads.parallel([&](int thread) { part(thread, threads.size()); });
  return 0;
}
SEPTET_API int septet_gumbel(void* pool, int path, const float* logits, int64_t count, int64_t n, int64_t ld, const float* temperature,
                             const int64_t* seeds, const int64_t* positions, int64_t* out) {
  const StepKernels* kernels = step_kernels_for(static_cast<Path>(path));
  if (!kernels) return -1;
  Pool& threads = *static_cast<Pool*>(pool);
  const auto part = [&](int thread, int parts) {
    const Range rows = share(count, thread, parts);
    for (int64_t r = rows.first; r < rows.last; r++)
      out[r] = kernels->gumbel_argmax(logits + r * ld, n, temperature[r], seeds[r], positions[r]);
  };
  if (count == 1) part(0, 1);
  else threads.parallel([&](int thread) { part(thread, threads.size()); });
  return 0;
}

// The C interface of the tape and of choosing tokens. Called by septet/kernels/native/. See api.h and tape.h.
#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <vector>

#include "api.h"
#include "sampling.h"
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

SEPTET_API int septet_tape_decode(void* tape, const Decode* rows) {
  try {
    return static_cast<Tape*>(tape)->decode(*rows);
  } catch (...) {
    return -1;
  }
}

SEPTET_API int septet_tape_draw_again(void* tape, const Decode* rows) {
  try {
    return static_cast<Tape*>(tape)->draw_again(*rows), 0;
  } catch (...) {
    return -1;
  }
}

// The final hidden states (T, width) of the last run, one after the other; until the next.
SEPTET_API const float* septet_tape_hidden(void* tape) { return static_cast<const Tape*>(tape)->hidden_states(); }

// See Tape::times: two arrays of one value for each phase, and one more.
SEPTET_API void septet_tape_times(void* tape, double* work, double* wait) { static_cast<Tape*>(tape)->times(work, wait); }

// Sizes of the structures that Python fills, to be compared with its own before anything else is called.
SEPTET_API void septet_tape_sizes(int64_t* sizes) {
  const int64_t all[] = {sizeof(Register), sizeof(RowOp), sizeof(Product), sizeof(Attention), sizeof(Phase), sizeof(LayerPool), sizeof(Program), sizeof(Step), sizeof(Decode)};
  for (int i = 0; i < 9; i++) sizes[i] = all[i];
}

// logits (count, n) float32, row stride ld; out (count). See Ops.argmax.
SEPTET_API int septet_argmax(void* pool, int path, const float* logits, int64_t count, int64_t n, int64_t ld, int64_t* out) {
  const StepKernels* kernels = step_kernels_for(static_cast<Path>(path));
  if (!kernels) return -1;
  Pool& threads = *static_cast<Pool*>(pool);
  threads.parallel([&](int thread) {
    const Range rows = share(count, thread, threads.active());
    for (int64_t r = rows.first; r < rows.last; r++) out[r] = kernels->argmax(logits + r * ld, n);
  });
  return 0;
}

// See Ops.gumbel_argmax.
SEPTET_API int septet_gumbel(void* pool, int path, const float* logits, int64_t count, int64_t n, int64_t ld, const float* temperature,
                             const int64_t* seeds, const int64_t* positions, int64_t* out) {
  const StepKernels* kernels = step_kernels_for(static_cast<Path>(path));
  if (!kernels) return -1;
  Pool& threads = *static_cast<Pool*>(pool);
  threads.parallel([&](int thread) {
    const Range rows = share(count, thread, threads.active());
    for (int64_t r = rows.first; r < rows.last; r++)
      out[r] = kernels->gumbel_argmax(logits + r * ld, n, temperature[r], seeds[r], positions[r]);
  });
  return 0;
}

// See Ops.filter_logits: out (count, n), -inf where a token is excluded. -1: no memory or path.
SEPTET_API int septet_filter(void* pool, int path, const float* logits, int64_t count, int64_t n, const float* temperature,
                             const int64_t* top_k, const float* top_p, const float* min_p, float* out) {
  const StepKernels* kernels = step_kernels_for(static_cast<Path>(path));
  if (!kernels) return -1;
  Pool& threads = *static_cast<Pool*>(pool);
  try {
    std::vector<SamplingScratch> scratch(static_cast<size_t>(threads.size()));
    for (SamplingScratch& mine : scratch) mine.fit(n);
    threads.parallel([&](int thread) {
      const Range rows = share(count, thread, threads.active());
      for (int64_t r = rows.first; r < rows.last; r++) {
        const float* from = logits + r * n;
        float* to = out + r * n;
        if (temperature[r] <= 0.0f || !keep(*kernels, from, n, {temperature[r], top_k[r], top_p[r], min_p[r], 0, 0}, scratch[thread])) {
          std::copy(from, from + n, to);
          continue;
        }
        std::fill(to, to + n, -INFINITY);
        for (uint32_t token : scratch[thread].tokens) to[token] = from[token];
      }
    });
  } catch (...) {
    return -1;
  }
  return 0;
}

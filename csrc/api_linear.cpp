// The C interface of pools, packed weights and the matrix product. Called by septet/kernels/native/. See api.h.
#include <stdlib.h>

#include "api.h"
#include "linear.h"
#include "pack.h"
#include "pool.h"

using namespace septet;

SEPTET_API int septet_abi() { return SEPTET_ABI; }
SEPTET_API int septet_best_path() { return static_cast<int>(best_path()); }
SEPTET_API int septet_has_path(int path) { return path >= 0 && path <= 2 && cpu_has(static_cast<Path>(path)); }
SEPTET_API int septet_has_bf16() { return cpu_has_bf16(); }

// A pool of `threads`, the caller of septet_linear and its like included; null if threads can't be started.
SEPTET_API void* septet_pool_create(int threads, int pin) {
  try {
    return new Pool(threads, pin != 0);
  } catch (...) {
    return nullptr;
  }
}
SEPTET_API void septet_pool_release(void* pool) { delete static_cast<Pool*>(pool); }
SEPTET_API int septet_pool_active(const void* pool) { return static_cast<const Pool*>(pool)->active(); }

SEPTET_API void* septet_arena_create() { return arena_create(); }
SEPTET_API void septet_arena_release(void* arena) { arena_release(static_cast<Arena*>(arena)); }

// rows (n, bytes of k weights) in GGUF type number `kind` -> packed, or null and *error = why (a static string).
SEPTET_API void* septet_pack(void* arena, void* pool, const void* rows, int64_t n, int64_t k, int kind, int path, const char** error) {
  return pack(static_cast<Arena*>(arena), static_cast<Pool*>(pool), static_cast<const uint8_t*>(rows), n, k, kind, static_cast<Path>(path), error);
}
SEPTET_API void septet_packed_release(void* packed) { packed_release(static_cast<Packed*>(packed)); }
SEPTET_API int64_t septet_packed_bytes(const void* packed) { return static_cast<const Packed*>(packed)->bytes; }

// ids (count,) of rows -> out (count, k) float32, row stride ldo. -1: an id outside the weight; nothing is written then.
SEPTET_API int septet_packed_rows(const void* packed, const int64_t* ids, int64_t count, float* out, int64_t ldo) {
  const Packed& w = *static_cast<const Packed*>(packed);
  for (int64_t i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= w.n) return -1;
  for (int64_t i = 0; i < count; i++) dequantize_row(w, ids[i], out + i * ldo);
  return 0;
}

// y (t, n) = x (t, k) W^T + bias (n,) or null, on the pool. -1: out of memory.
SEPTET_API int septet_linear(void* pool, const void* packed, const float* x, int64_t ldx, int64_t t, float* y, int64_t ldy, const float* bias) {
  const Packed& w = *static_cast<const Packed*>(packed);
  Pool& threads = *static_cast<Pool*>(pool);
  void* memory = nullptr;
  QuantInput qx{};
  if (!is_dense(w)) {
    if (posix_memalign(&memory, 64, static_cast<size_t>(quant_bytes(t, w.k)))) return -1;
    qx = quant_input(w.run, memory, t, w.k);
  }
  threads.parallel([&](int thread) {
    if (!is_dense(w)) {
      const Range tokens = share(t, thread, threads.active());
      QuantInput mine = qx;
      quantize_rows(x, ldx, w.k, tokens.first, tokens.last, mine);
      threads.barrier(thread);
    }
    const Range part = share(groups(w), thread, threads.active());
    linear_part(w, qx, x, ldx, t, part.first, part.last, y, ldy, bias);
  });
  free(memory);
  return 0;
}

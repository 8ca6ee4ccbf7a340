// Measurements that stand beside every figure: the machine's read bandwidth, the kernels without Python around them.
//
// Called by septet/bench/native_linear.py and by `septet doctor`. Needs nothing of the model.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "api.h"
#include "linear.h"
#include "pack.h"
#include "pool.h"

using namespace septet;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Reads all of p once; the sum keeps the compiler from leaving it out.
uint64_t read_all(const uint64_t* p, int64_t words) {
  uint64_t sums[32] = {};
  for (int64_t i = 0; i + 32 <= words; i += 32)
    for (int j = 0; j < 32; j++) sums[j] ^= p[i + j];
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

// Bytes a second that all threads together read from memory: the median of `repeats` passes over `bytes` (choose more than
// the caches hold). 0: out of memory.
SEPTET_API double septet_probe_bandwidth(void* pool_handle, int64_t bytes, int repeats) {
  Pool& pool = *static_cast<Pool*>(pool_handle);
  const char* error = nullptr;
  Arena* arena = arena_create();
  const int64_t rows = bytes / 4096 / GROUP * GROUP;
  std::vector<float> zeros(1024 * static_cast<size_t>(rows), 1.0f);
  Packed* memory = arena ? pack(arena, &pool, reinterpret_cast<const uint8_t*>(zeros.data()), rows, 1024, static_cast<int>(Kind::f32), Path::portable, &error) : nullptr;
  std::vector<double> seconds;
  std::vector<uint64_t> sums(static_cast<size_t>(pool.size()) * 8);
  for (int i = 0; memory && i < repeats; i++) {
    const double start = now();
    pool.parallel([&](int thread) {
      const Range mine = share(memory->bytes / 8, thread, pool.active());
      sums[static_cast<size_t>(thread) * 8] += read_all(reinterpret_cast<const uint64_t*>(memory->data) + mine.first, mine.last - mine.first);
    });
    seconds.push_back(now() - start);
  }
  volatile uint64_t sink = sums[0];
  (void)sink;
  const double rate = memory ? static_cast<double>(memory->bytes) / median(seconds) : 0.0;
  packed_release(memory);
  arena_release(arena);
  return rate;
}

// Seconds (median of `repeats`) of one pass over `count` weights with t tokens, inputs quantised beforehand, a barrier
// after each weight, as a model's step does. x (t, k) is shared: all weights have the same k. -1: out of memory.
SEPTET_API double septet_bench_linear(void* pool_handle, const void* const* packed, int count, const float* x, int64_t t, float* y, int repeats) {
  Pool& pool = *static_cast<Pool*>(pool_handle);
  const Packed& first = *static_cast<const Packed*>(packed[0]);
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(quant_bytes(t, first.k)))) return -1;
  QuantInput qx = quant_input(first.run, memory, t, first.k);
  quantize_rows(x, first.k, first.k, 0, t, qx);
  std::vector<double> seconds;
  for (int i = 0; i < repeats; i++) {
    const double start = now();
    pool.parallel([&](int thread) {
      for (int j = 0; j < count; j++) {
        const Packed& w = *static_cast<const Packed*>(packed[j]);
        const Range mine = share(groups(w), thread, pool.active());
        linear_part(w, qx, x, w.k, t, mine.first, mine.last, y, w.n, nullptr);
        pool.barrier(thread);
      }
    });
    seconds.push_back(now() - start);
  }
  free(memory);
  return median(seconds);
}

// Seconds of one barrier of all threads.
SEPTET_API double septet_bench_barrier(void* pool_handle, int count) {
  Pool& pool = *static_cast<Pool*>(pool_handle);
  const double start = now();
  pool.parallel([&](int thread) {
    for (int i = 0; i < count; i++) pool.barrier(thread);
  });
  return (now() - start) / count;
}

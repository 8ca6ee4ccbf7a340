// What the paths share: the choice of a path's kernels, the quantised input's planes, scratch memory. See linear.h.
#include "linear.h"

#include <memory>
#include <new>

#include "kernel_tables.h"

namespace septet {
namespace {

struct Scratch {
  std::unique_ptr<char[]> memory;
  int64_t size = 0;
};

}  // namespace

const Kernels* kernels_for(Path path) {
  if (!cpu_has(path)) return nullptr;
#if defined(__x86_64__) && !defined(SEPTET_NO_AVX512)
  if (path == Path::avx512) return avx512_kernels(cpu_has_bf16());
#endif
#if defined(__x86_64__) && !defined(SEPTET_NO_AVX2)
  if (path == Path::avx2) return avx2_kernels();
#endif
  return portable_kernels();
}

void* thread_scratch(int64_t bytes) {
  static thread_local Scratch scratch;
  if (scratch.size < bytes + 64) {
    scratch.memory.reset(new (std::nothrow) char[static_cast<size_t>(bytes + 64)]);
    scratch.size = scratch.memory ? bytes + 64 : 0;
    if (!scratch.memory) return nullptr;
  }
  const uintptr_t at = reinterpret_cast<uintptr_t>(scratch.memory.get());
  return scratch.memory.get() + (64 - at % 64) % 64;
}

QuantInput quant_input(const Kernels* run, void* memory, int64_t tokens, int64_t k) {
  return {static_cast<uint8_t*>(memory), (k + BLOCK - 1) / BLOCK, tokens > 1 ? 4 : 1, run};
}

int64_t quant_bytes(int64_t tokens, int64_t k) {
  const int64_t blocks = (k + BLOCK - 1) / BLOCK;
  const int64_t bytes = tokens > 1 ? (tokens + 3) / 4 * blocks * static_cast<int64_t>(sizeof(InputBlock<4>)) : blocks * static_cast<int64_t>(sizeof(InputBlock<1>));
  return (bytes + 63) / 64 * 64;
}

}  // namespace septet

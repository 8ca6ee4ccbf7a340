// See cpu.h.
#include "cpu.h"

#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#include <stdlib.h>
#endif

namespace septet {

#if defined(__x86_64__)
namespace {

struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  Leaf(uint32_t leaf, uint32_t sub) { __get_cpuid_count(leaf, sub, &a, &b, &c, &d); }
};

bool bit(uint32_t word, int n) { return (word >> n) & 1; }

// Register state that the operating system saves: XCR0 (Intel SDM vol. 1, 13.3).
uint64_t saved_state() {
  if (!bit(Leaf(1, 0).c, 27)) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// SEPTET_NO_*: left out by build.py, whose compiler does not know the path.
#if defined(SEPTET_NO_AVX2)
bool has_avx2() { return false; }
#else
bool has_avx2() {
  const Leaf one(1, 0), seven(7, 0);
  const bool fma = bit(one.c, 12), avx = bit(one.c, 28), f16c = bit(one.c, 29), avx2 = bit(seven.b, 5);
  return (saved_state() & 0x6) == 0x6 && fma && avx && f16c && avx2;
}
#endif

#if defined(SEPTET_NO_AVX512)
bool has_avx512() { return false; }
#elif defined(SEPTET_EMULATE)  // build.py --emulate-avx512
bool has_avx512() { return has_avx2(); }
#else
bool has_avx512() {
  const Leaf seven(7, 0);
  const bool f = bit(seven.b, 16), dq = bit(seven.b, 17), bw = bit(seven.b, 30), vl = bit(seven.b, 31);
  return (saved_state() & 0xe6) == 0xe6 && f && dq && bw && vl && bit(seven.c, 11) /* VNNI */ && has_avx2();
}
#endif

}  // namespace

bool cpu_has(Path path) {
  switch (path) {
    case Path::portable: return true;
    case Path::avx2: return has_avx2();
    case Path::avx512: return has_avx512();
  }
  return false;
}

#if defined(SEPTET_NO_AVX512BF16)
bool cpu_has_bf16() { return false; }
#elif defined(SEPTET_EMULATE)
bool cpu_has_bf16() { return has_avx512() && getenv("SEPTET_EMULATE_BF16"); }
#else
bool cpu_has_bf16() { return has_avx512() && bit(Leaf(7, 1).a, 5); }
#endif
#else
bool cpu_has(Path path) { return path == Path::portable; }
bool cpu_has_bf16() { return false; }
#endif

Path best_path() {
  for (Path path : {Path::avx512, Path::avx2})
    if (cpu_has(path)) return path;
  return Path::portable;
}

const char* path_name(Path path) {
  switch (path) {
    case Path::avx512: return "avx512";
    case Path::avx2: return "avx2";
    case Path::portable: return "portable";
  }
  return "unknown";
}

}  // namespace septet

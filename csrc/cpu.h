// Which instruction sets this CPU (and its operating system) lets us use, and the paths built on them.
//
// A path is a set of kernels: `portable` compiles and runs anywhere, `avx2` needs AVX2 + FMA + F16C, `avx512` needs
// AVX-512 F/BW/DQ/VL + VNNI (BF16 is asked for apart). Nothing is cached and nothing is global: the caller keeps the
// answer. Files named *_avx2.cpp and *_avx512.cpp are compiled with that instruction set: they must not instantiate
// templates or inline functions of headers that portable files share (the linker keeps one copy of them, maybe theirs),
// so they include <immintrin.h>, C headers and plain structs only, and keep their own code in an anonymous namespace.
#pragma once

namespace septet {

enum class Path : int { portable = 0, avx2 = 1, avx512 = 2 };

bool cpu_has(Path path);     // may this path run here?
bool cpu_has_bf16();         // AVX512_BF16, for the avx512 path's dense kernels
Path best_path();            // the fastest path that may run here
const char* path_name(Path path);

}  // namespace septet

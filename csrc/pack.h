// Packed weights: layouts, memory, conversion from GGUF's blocks. Called by api_linear.cpp; read by linear_*.cpp.
//
// All quantised forms hold, for 16 rows x 32 inputs, the same picture of 4-byte cells [row r][input 4j + c], c = 0 .. 3,
// so that one 64-byte line is 16 rows x 4 inputs: a vector register of any path holds 4, 8 or 16 rows, a broadcast of 4
// activations meets them all, and no sum crosses lanes. A group (16 rows) is its blocks one after the other; K-quants
// have a head before each 8 blocks. Little endian throughout.
//
//   codes4   256 B: line j (of 4), byte 4r + c: low nibble = code of input 4j + c, high nibble = of input 16 + 4j + c
//   bit5      64 B: byte 4r + c: bit j = fifth bit of input 4j + c, bit 4 + j = of input 16 + 4j + c
//   bits56   128 B: line h (of 2), byte 4r + c: bits 2j, 2j + 1 = bits 4, 5 of the code of input 16h + 4j + c
//   codes8   512 B: line i (of 8), byte 4r + c: int8 weight of input 4i + c
//
//   form   block (32 inputs)                                            head (256 inputs)          weight
//   q4_0   codes4, d f16[16]                               288 B                                   d (q - 8)
//   q4_w   codes4, s i16[16]; behind the group w bf16[16]  288 B                                   w s (q - 8)
//   q4_1   codes4, d f16[16], m f16[16]                    320 B                                   d q + m
//   q5_0   codes4, bit5, d f16[16]                         352 B                                   d (q - 16)
//   q5_1   codes4, bit5, d f16[16], m f16[16]              384 B                                   d q + m
//   q8_0   codes8, d f16[16]                               544 B                                   d q
//   q8_f   codes8, d f32[16]                               576 B                                   d q
//   q4_k   codes4, s u8[16], m u8[16]                      288 B    d f16[16], dmin f16[16]  64 B  d s q - dmin m
//   q5_k   codes4, bit5, s u8[16], m u8[16]                352 B    d f16[16], dmin f16[16]  64 B  d s q - dmin m
//   q6_k   codes4, bits56, s i8[16][2]                     416 B    d f16[16]                32 B  d s (q - 32)
//   q2_k   codes4, bits56, s i8[16][2], m u8[16][2]        448 B    d f16[16], dmin f16[16]  64 B  d s (q - 32) - dmin m
//   bf16   16 rows x 2 inputs: [row][2] bfloat16            64 B                                   itself
//   f16    16 rows x 1 input:  [row] float16                32 B                                   itself
//   f32    16 rows x 1 input:  [row] float32                64 B                                   itself
//
// (q4_w: w is a power of two, all of which a row's scales are whole multiples of. f16 scales of a row seldom are more than
// 15 bits apart; a group with such a row has q4_0's d in place of s, and w = 0.)
// (s and m of q6_k and q2_k: [row][half], half h covers inputs 16h .. 16h + 15.) Rows past n and inputs past k are zero.
#pragma once

#include <stdint.h>

#include "linear.h"

namespace septet {

class Pool;

// Byte sizes of a form's parts. Offsets inside a block: codes, then bits, then scales, then minima.
struct Shape {
  int codes;    // bytes of codes4 / codes8
  int bits;     // bytes of bit5 / bits56
  int scales;   // bytes of d or s
  int minima;   // bytes of m
  int head;     // bytes before each 8 blocks, 0 = none
  int inputs;   // inputs of a block
  constexpr int block() const { return codes + bits + scales + minima; }
};

constexpr Shape shape_of(Form form) {
  switch (form) {
    case Form::q4_0: case Form::q4_w: return {256, 0, 32, 0, 0, 32};
    case Form::q4_1: return {256, 0, 32, 32, 0, 32};
    case Form::q5_0: return {256, 64, 32, 0, 0, 32};
    case Form::q5_1: return {256, 64, 32, 32, 0, 32};
    case Form::q8_0: return {512, 0, 32, 0, 0, 32};
    case Form::q8_f: return {512, 0, 64, 0, 0, 32};
    case Form::q4_k: return {256, 0, 16, 16, 64, 32};
    case Form::q5_k: return {256, 64, 16, 16, 64, 32};
    case Form::q6_k: return {256, 128, 32, 0, 32, 32};
    case Form::q2_k: return {256, 128, 32, 32, 64, 32};
    case Form::bf16: return {64, 0, 0, 0, 0, 2};
    case Form::f16: return {32, 0, 0, 0, 0, 1};
    case Form::f32: return {64, 0, 0, 0, 0, 1};
  }
  return {0, 0, 0, 0, 0, 1};
}

constexpr int64_t TAIL = 32;  // of a group of q4_w

// Bytes of a group of k inputs.
constexpr int64_t group_bytes(Form form, int64_t k) {
  const Shape shape = shape_of(form);
  return (k + shape.inputs - 1) / shape.inputs * shape.block() + (shape.head ? k / 256 * shape.head : 0) + (form == Form::q4_w ? TAIL : 0);
}

// GGUF's numbers of its types (ggml.h, enum ggml_type).
enum class Kind : int {
  f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13,
  q6_k = 14, iq4_nl = 20, iq4_xs = 23, bf16 = 30,
};

// Memory of packed weights: big chunks in huge pages (transparent, by madvise), so that neighbouring tensors share them.
// A chunk goes back to the system when the arena and all weights in it are gone. Not thread-safe.
class Arena;
Arena* arena_create();
void arena_release(Arena* arena);

// Rows of GGUF blocks (n, row_bytes(kind, k)) -> packed, on the pool's threads (null = this one). The source is only read.
// nullptr with *error (a static string) set: unknown kind, bad size, path not available, out of memory.
Packed* pack(Arena* arena, Pool* pool, const uint8_t* rows, int64_t n, int64_t k, int kind, Path path, const char** error);
void packed_release(Packed* packed);

int64_t row_bytes(Kind kind, int64_t k);  // 0 where k does not fit the kind or the kind is unknown

float half_to_float(uint16_t half);  // without F16C

}  // namespace septet

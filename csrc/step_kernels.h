// What the tape calls besides the matrix kernels: norms, activations, rotation, attention, choosing tokens; per path.
//
// Written once in elementwise_body.h, attention_body.h and sampling_body.h over lanes.h; compiled by step_portable.cpp,
// step_avx2.cpp and step_avx512.cpp. Plain structs only: shared by files of different instruction sets (see cpu.h).
// All kernels run on the calling thread. A result depends on its own row only, bit for bit: not on the other rows of the
// step, not on the number of threads.
#pragma once

#include <stdint.h>

#include "cpu.h"

namespace septet {

enum class Activation : int { silu = 0, gelu_tanh = 1 };
enum class Store : int { f32 = 0, f16 = 1, bf16 = 2 };  // how keys and values lie in the pool

// One layer's keys and values of one kv head: element e of slot s is at k[s * stride + e] (in elements of `store`).
struct HeadKV {
  const void* k;
  const void* v;
  int64_t k_stride, v_stride;
  Store store;
};

// Attention's fixed numbers. scale multiplies q.k; cap 0 = off; window 0 = all.
struct AttendShape {
  int64_t dim;     // E
  int64_t heads;   // query heads of one kv head
  float scale, cap;
  int64_t window;
};

// One token over positions first .. last - 1 of its context (its own position included where it lies there), all of one
// part (part_of).
// A part's result, for each head: [max score, sum of e^(score - max), sum of e^(score - max) * v (E)].
struct AttendOne {
  HeadKV kv;
  const int32_t* slots;  // slot of each position of the row
  int64_t first, last;
  const float* q;        // (heads, E) rotated, not scaled
  float* part;           // (heads, E + 2)
};

// Queries at positions start .. start + count - 1, which the same row's context up to there serves.
struct AttendTile {
  HeadKV kv;
  const int32_t* slots;
  int64_t start, count;
  const float* q;        // token i, head h at q + i * ld_q + h * E
  int64_t ld_q;
  float* out;            // the same shape, stride ld_out
  int64_t ld_out;
};

constexpr int64_t TILE_KEYS = 64;      // positions of a tile; tiles start at multiples of it
constexpr int64_t TILE_QUERIES = 96;   // tokens x heads of an AttendTile, at most, where one token has no more heads

// Parts of a context, which decoding shares among threads, begin at fixed positions: each tile up to SHORT, then every
// LONG_PART. A row's result so depends on its own position only. (Unnamed: included under several instruction sets.)
namespace {
constexpr int64_t SHORT = 512, LONG_PART = 256;
inline int64_t part_of(int64_t position) {
  return position < SHORT ? position / TILE_KEYS : SHORT / TILE_KEYS + (position - SHORT) / LONG_PART;
}
inline int64_t part_start(int64_t part) {
  return part <= SHORT / TILE_KEYS ? part * TILE_KEYS : SHORT + (part - SHORT / TILE_KEYS) * LONG_PART;
}
}  // namespace

struct StepKernels {
  Path path;
  // out = x / rms(x) * weight; sum and out may not alias x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  void (*add)(const float* a, const float* b, int64_t n, float* out);
  void (*scale)(float* x, float factor, int64_t n);
  void (*gated)(const float* gate, const float* up, int64_t n, Activation kind, float* out);
  void (*soft_cap)(const float* x, float cap, int64_t n, float* out);
  // One head: RMS norm where weight is given, then rotation in halves by cos_sin (E) = [cos | sin].
  void (*rotate)(const float* x, const float* weight, float eps, const float* cos_sin, int64_t dim, float* out);
  void (*to_pool)(const float* x, int64_t n, Store store, void* out);
  int64_t (*scratch_one)(const AttendShape& shape);  // bytes
  int64_t (*scratch_tile)(const AttendShape& shape, int64_t count);
  void (*attend_one)(const AttendShape& shape, const AttendOne& task, void* scratch);
  void (*attend_tile)(const AttendShape& shape, const AttendTile& task, void* scratch);
  // parts (count) of one head, `stride` floats apart, in order of positions -> out (E)
  void (*merge)(const float* parts, int64_t count, int64_t stride, int64_t dim, float* out);
  int64_t (*argmax)(const float* logits, int64_t n);  // lowest index on ties, -1 where there is a NaN
  int64_t (*gumbel_argmax)(const float* logits, int64_t n, float temperature, int64_t seed, int64_t position);
  void (*exps)(const float* x, int64_t n, float largest, float factor, float* out);  // e^((x - largest) * factor)
};

const StepKernels* step_kernels_portable();
const StepKernels* step_kernels_avx2();
const StepKernels* step_kernels_avx512();
const StepKernels* step_kernels_for(Path path);  // nullptr where this CPU lacks the path

}  // namespace septet

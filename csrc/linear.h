// The seam of the matrix kernels: y = x W^T for packed weights, on the calling thread, for a range of output rows.
//
// Called by the tape (step.cpp and friends) and by api_linear.cpp; knows no models, requests or pools. Use:
//
//   const Kernels* run = kernels_for(best_path());
//   QuantInput qx = quant_input(run, memory, T, K);             // memory: quant_bytes(T, K) bytes, 64-byte aligned
//   quantize_rows(x, ldx, K, t0, t1, qx);                       // any threads, disjoint token ranges; then a barrier
//   linear_part(w, qx, x, ldx, T, g0, g1, y, ldy, bias);        // any threads, disjoint ranges of row groups
//
// Guarantees: a result depends on its own token and row only, bit for bit: T, t0, g0 and the thread count never change
// it (GEMV, skinny and panel versions do the same float operations in the same order). Integer products are exact on
// every path; AVX2 and AVX-512 give the same bits but for Q4_0, of which AVX2 adds two blocks as one whole number. A NaN or infinity in a token's input makes all outputs of that token NaN. Memory outside the n rows of y is
// never written; x is read within its k columns only.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu.h"

namespace septet {

// How a weight is stored. The first nine are GGUF's types in interleaved order, bit for bit the same numbers; `q2_k`
// also holds nothing else; other GGUF types are converted without loss: Q3_K -> q6_k, IQ4_NL and IQ4_XS -> q8_f, and on the
// AVX2 path Q4_0 -> q4_w.
enum class Form : int { q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, q2_k, q8_f, q4_w, bf16, f16, f32 };

constexpr int64_t GROUP = 16;  // output rows of a group: the unit in which threads share a matrix
constexpr int64_t BLOCK = 32;  // inputs of a block: one scale of the weights; two blocks have one of the activations

struct Kernels;

// A weight of n rows (outputs) and k columns (inputs) in `form`; layout in pack.h. Rows are padded to whole groups.
struct Packed {
  int64_t n, k;
  Form form;
  int64_t group_count;     // ceil(n / GROUP)
  int64_t group_bytes;     // stride of a group
  const uint8_t* data;     // 64-byte aligned
  int64_t bytes;           // group_count * group_bytes
  const Kernels* run;      // the path's kernels
  void* owner;             // the arena chunk that holds `data`
};

inline int64_t groups(const Packed& w) { return w.group_count; }
inline bool is_dense(const Packed& w) { return w.form >= Form::bf16; }  // reads x itself, needs no QuantInput

// Activations of up to T tokens as int8 in blocks of 32 inputs: x = q * d, -127 <= q <= 127. Blocks 2i and 2i + 1 have the
// same d, so that their sums may be added before it is applied. d is NaN where x is not finite. Laid out for the kernels (InputBlock in kernel_tables.h): `lanes` tokens side by side in each block.
struct QuantInput {
  uint8_t* data;
  int64_t blocks;  // ceil(k / 32), the last one padded with zeros
  int lanes;       // 1 where made for one token, else 4
  const Kernels* run;
};

// A path's kernels. Chosen once by who packs, carried by each Packed and QuantInput.
struct Kernels {
  Path path;
  void (*quantize_rows)(const float* x, int64_t ldx, int64_t k, int64_t t0, int64_t t1, QuantInput& out);
  void (*linear_part)(const Packed& w, const QuantInput& qx, const float* x, int64_t ldx, int64_t t_count, int64_t g0,
                      int64_t g1, float* y, int64_t ldy, const float* bias);
};

const Kernels* kernels_for(Path path);  // nullptr where this build or this CPU lacks the path

int64_t quant_bytes(int64_t tokens, int64_t k);  // never less for more tokens
QuantInput quant_input(const Kernels* run, void* memory, int64_t tokens, int64_t k);

// Tokens t0 .. t1 - 1 of x (T, k), row stride ldx in floats, into tokens t0 .. t1 - 1 of `out`. (Threads share cache lines
// less where t0 is a multiple of 4.)
inline void quantize_rows(const float* x, int64_t ldx, int64_t k, int64_t t0, int64_t t1, QuantInput& out) {
  out.run->quantize_rows(x, ldx, k, t0, t1, out);
}

// y[t * ldy + r] = sum over k of x[t, k] * w[r, k] (+ bias[r]) for t < t_count and rows r of groups g0 .. g1 - 1, r < n.
// Dense weights read x (T, k) with row stride ldx; the others read qx only (x may be null). bias (n,) or null.
inline void linear_part(const Packed& w, const QuantInput& qx, const float* x, int64_t ldx, int64_t t_count, int64_t g0,
                        int64_t g1, float* y, int64_t ldy, const float* bias) {
  w.run->linear_part(w, qx, x, ldx, t_count, g0, g1, y, ldy, bias);
}

// Row `row` of the weight as k floats, exactly as its GGUF type defines them: for embeddings that share the head's copy.
void dequantize_row(const Packed& w, int64_t row, float* out);

// This thread's scratch: at least `bytes`, 64-byte aligned, valid until the thread's next call; freed with the thread.
// nullptr when memory is out. linear_part uses it.
void* thread_scratch(int64_t bytes);

}  // namespace septet

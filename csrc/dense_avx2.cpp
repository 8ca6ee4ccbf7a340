// Dense weights (bf16, f16, f32) on the AVX2 path: inputs in floats, one fma per input and output, in order of the inputs.
// Called by linear_avx2.cpp.
#include "codes_avx2.h"
#include "store_avx2.h"

namespace septet {
namespace {

constexpr int64_t AHEAD = 4096;  // bytes of prefetch in the stream of weights

// 16 rows of one input (of two inputs for bf16).
template <Form F>
struct Column {
  F8 first[2], second[2];

  explicit Column(const uint8_t* at) {
    for (int v = 0; v < 2; v++) {
      if constexpr (F == Form::f32) first[v] = _mm256_loadu_ps(reinterpret_cast<const float*>(at) + 8 * v);
      if constexpr (F == Form::f16) first[v] = halves8(at + 16 * v);
      if constexpr (F == Form::bf16) {
        const I8 raw = load(at + 32 * v);
        first[v] = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
        second[v] = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
      }
    }
  }
};

// acc (R tokens, G groups, 2) += input i (a pair of inputs for bf16) of G groups.
template <Form F, int R, int G>
inline void dense_step(F8 (&acc)[R][G][2], const uint8_t* p, int64_t stride, const float* x, int64_t ldx, bool pair) {
  for (int g = 0; g < G; g++) {
    const Column<F> w(p + g * stride);
    for (int t = 0; t < R; t++) {
      const F8 in = _mm256_broadcast_ss(x + t * ldx);
      for (int v = 0; v < 2; v++) acc[t][g][v] = _mm256_fmadd_ps(w.first[v], in, acc[t][g][v]);
    }
    if constexpr (F == Form::bf16) {
      for (int t = 0; pair && t < R; t++) {
        const F8 in = _mm256_broadcast_ss(x + t * ldx + 1);
        for (int v = 0; v < 2; v++) acc[t][g][v] = _mm256_fmadd_ps(w.second[v], in, acc[t][g][v]);
      }
    }
  }
}

// G groups from `group` on by R tokens -> c (G, R, 16).
template <Form F, int R, int G>
APART void dense_tile(const Packed& w, const uint8_t* group, const float* x, int64_t ldx, float* c) {
  constexpr Shape shape = shape_of(F);
  F8 acc[R][G][2];
  for (int t = 0; t < R; t++)
    for (int g = 0; g < G; g++) acc[t][g][0] = acc[t][g][1] = _mm256_setzero_ps();
  const uint8_t* p = group;
  int64_t i = 0;
  for (; i + shape.inputs <= w.k; i += shape.inputs, p += shape.codes) {
    if constexpr (R == 1) _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD / 4), _MM_HINT_T0);
    dense_step<F, R, G>(acc, p, w.group_bytes, x + i, ldx, true);
  }
  if (i < w.k) dense_step<F, R, G>(acc, p, w.group_bytes, x + i, ldx, false);
  for (int g = 0; g < G; g++)
    for (int t = 0; t < R; t++)
      for (int v = 0; v < 2; v++) _mm256_storeu_ps(c + (g * R + t) * 16 + 8 * v, acc[t][g][v]);
}

template <Form F, int R, int G>
void dense_groups(const Packed& w, const float* x, int64_t ldx, int64_t t, int64_t g, const Out& out) {
  alignas(64) float c[R * G * GROUP];
  dense_tile<F, R, G>(w, w.data + g * w.group_bytes, x + t * ldx, ldx, c);
  for (int i = 0; i < G; i++) store_group(w, g + i, c + i * R * GROUP, t, R, out);
}

// Few tokens take two or three groups at a time: independent sums hide the latency of the fma.
template <Form F>
void dense(const Packed& w, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1, const Out& out) {
  constexpr int R = F == Form::bf16 ? 4 : 5;  // what 16 registers hold beside the weights
  int64_t g = g0;
  if (t_count == 1)
    for (; g + 3 <= g1; g += 3) dense_groups<F, 1, 3>(w, x, ldx, 0, g, out);
  if (t_count == 2)
    for (; g + 2 <= g1; g += 2) dense_groups<F, 2, 2>(w, x, ldx, 0, g, out);
  for (; g < g1; g++) {
    int64_t t = 0;
    for (; t + R <= t_count; t += R) dense_groups<F, R, 1>(w, x, ldx, t, g, out);
    const int64_t left = t_count - t;
    if (R > 4 && left == 4) dense_groups<F, 4, 1>(w, x, ldx, t, g, out);
    else if (left == 3) dense_groups<F, 3, 1>(w, x, ldx, t, g, out);
    else if (left == 2) dense_groups<F, 2, 1>(w, x, ldx, t, g, out);
    else if (left == 1) dense_groups<F, 1, 1>(w, x, ldx, t, g, out);
  }
}

}  // namespace

void avx2_dense(const Packed& w, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1, float* y, int64_t ldy,
                const float* bias) {
  const Out out{y, ldy, bias};
  if (w.form == Form::bf16) dense<Form::bf16>(w, x, ldx, t_count, g0, g1, out);
  else if (w.form == Form::f16) dense<Form::f16>(w, x, ldx, t_count, g0, g1, out);
  else dense<Form::f32>(w, x, ldx, t_count, g0, g1, out);
}

}  // namespace septet

// Norms, activations, rotation, conversion to the pool's type. Included once per path, after lanes.h; see step_kernels.h.
#pragma once

#include "lanes.h"
#include "step_kernels.h"

namespace septet {
namespace {

// fn(i, n): n lanes at i, n < LANES in the last turn only.
template <typename Fn>
inline void lanes_of(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) fn(i, LANES);
  if (i < n) fn(i, static_cast<int>(n - i));
}
inline F get(const float* p, int n) { return n == LANES ? load(p) : load_first(p, n); }
inline void put(float* p, int n, F x) {
  if (n == LANES) store(p, x);
  else store_first(p, n, x);
}

inline float square_sum(const float* x, int64_t n) {
  F a = zero(), b = zero();
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const F p = load(x + i), q = load(x + i + LANES);
    a = fma(p, p, a);
    b = fma(q, q, b);
  }
  lanes_of(n - i, [&](int64_t j, int m) {
    const F p = get(x + i + j, m);
    a = fma(p, p, a);
  });
  return total(add(a, b));
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  const F factor = spread(1.0f / sqrtf(square_sum(x, n) / static_cast<float>(n) + eps));
  lanes_of(n, [&](int64_t i, int m) { put(out + i, m, mul(mul(get(x + i, m), factor), get(weight + i, m))); });
}

void add_rows(const float* a, const float* b, int64_t n, float* out) {
  lanes_of(n, [&](int64_t i, int m) { put(out + i, m, add(get(a + i, m), get(b + i, m))); });
}

void scale_row(float* x, float factor, int64_t n) {
  const F f = spread(factor);
  lanes_of(n, [&](int64_t i, int m) { put(x + i, m, mul(get(x + i, m), f)); });
}

// silu(g) = g s(g); tanh-GELU = g s(2 u), u = sqrt(2 / pi) (g + 0.044715 g^3); s(z) = 1 / (1 + e^-z).
void gated(const float* gate, const float* up, int64_t n, Activation kind, float* out) {
  const F one = spread(1.0f), cubic = spread(0.044715f), twice = spread(-2.0f * 0.7978845608028654f);
  lanes_of(n, [&](int64_t i, int m) {
    const F g = get(gate + i, m);
    const F z = kind == Activation::silu ? sub(zero(), g) : mul(twice, mul(g, fma(mul(g, g), cubic, one)));
    put(out + i, m, mul(over(g, add(one, exponential(z))), get(up + i, m)));
  });
}

void soft_cap(const float* x, float cap, int64_t n, float* out) {
  const F c = spread(cap);
  lanes_of(n, [&](int64_t i, int m) { put(out + i, m, mul(c, tanh_of(over(get(x + i, m), c)))); });
}

void rotate(const float* x, const float* weight, float eps, const float* cos_sin, int64_t dim, float* out) {
  const int64_t half = dim / 2;
  const F factor = spread(weight ? 1.0f / sqrtf(square_sum(x, dim) / static_cast<float>(dim) + eps) : 1.0f);
  lanes_of(half, [&](int64_t i, int m) {
    F a = get(x + i, m), b = get(x + half + i, m);
    if (weight) a = mul(mul(a, factor), get(weight + i, m)), b = mul(mul(b, factor), get(weight + half + i, m));
    const F c = get(cos_sin + i, m), s = get(cos_sin + half + i, m);
    put(out + i, m, sub(mul(a, c), mul(b, s)));
    put(out + half + i, m, add(mul(b, c), mul(a, s)));
  });
}

void to_pool(const float* x, int64_t n, Store kind, void* out) {
  if (kind == Store::f32) {
    memcpy(out, x, static_cast<size_t>(n) * 4);
  } else if (kind == Store::f16) {
    uint16_t* y = static_cast<uint16_t*>(out);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_half(y + i, load(x + i));
    for (; i < n; i++) y[i] = float_half(x[i]);
  } else {
    for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(out)[i] = bf16_of_float(x[i]);
  }
}

void exps(const float* x, int64_t n, float largest_x, float factor, float* out) {
  const F most = spread(largest_x), f = spread(factor);
  lanes_of(n, [&](int64_t i, int m) { put(out + i, m, exponential(mul(sub(get(x + i, m), most), f))); });
}

}  // namespace
}  // namespace septet

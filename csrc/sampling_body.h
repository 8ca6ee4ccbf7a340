// Choosing tokens. Included once per path, after lanes.h; see step_kernels.h.
#pragma once

#include "elementwise_body.h"
#include "lanes.h"
#include "step_kernels.h"

namespace septet {
namespace {

int64_t argmax(const float* x, int64_t n) {
  F best = spread(-INFINITY);
  bool bad = false;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const F v = load(x + i);
    bad |= any_nan(v);
    best = larger(v, best);
  }
  float most = largest(best);
  for (; i < n; i++) {
    bad |= x[i] != x[i];
    most = x[i] > most ? x[i] : most;
  }
  if (bad) return -1;
  for (i = 0; i + LANES <= n; i += LANES)
    if (any(at_least(load(x + i), spread(most)))) break;
  for (; i < n; i++)
    if (x[i] == most) return i;
  return 0;
}

inline uint32_t mix(uint32_t h) {
  h = (h ^ h >> 16) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  return h ^ h >> 16;
}
inline I mix_all(I h) {
  h = mul_int(xor_int(h, right<16>(h)), spread_int(0x85EBCA6Bu));
  h = mul_int(xor_int(h, right<13>(h)), spread_int(0xC2B2AE35u));
  return xor_int(h, right<16>(h));
}

constexpr float MOST_NOISE = 16.64f;  // -log(-log(1 - 2^-24)) = 16.6355

// Ops.gumbel_argmax of one row; temperature > 0. Tokens too far below the best for any noise are not hashed.
int64_t gumbel_argmax(const float* x, int64_t n, float temperature, int64_t seed, int64_t position) {
  if (temperature <= 0.0f) return argmax(x, n);
  const int64_t top = argmax(x, n);
  if (top < 0) return -1;
  const uint64_t s = static_cast<uint64_t>(seed);
  const uint32_t high = static_cast<uint32_t>(s >> 32) + static_cast<uint32_t>(static_cast<uint64_t>(position) * 0x9E3779B9u);
  const uint32_t key = mix(static_cast<uint32_t>(s) ^ mix(high));
  uint32_t first[LANES];
  for (int j = 0; j < LANES; j++) first[j] = static_cast<uint32_t>(j) * 0x85EBCA6Bu;
  const I lanes = load_int(first);
  const F t = spread(temperature);
  float best = -INFINITY;
  int64_t winner = top;
  // No noise is below -2.9 (-log(-log(2^-24))): what lies more than 19.6 under the largest can't win.
  const F bar = spread(x[top] / temperature - MOST_NOISE - 3.0f);
  lanes_of(n, [&](int64_t i, int m) {
    F z = over(get(x + i, m), t);
    if (!any(at_least(z, bar))) return;
    const I h = mix_all(add_int(spread_int(key + static_cast<uint32_t>(i) * 0x85EBCA6Bu), lanes));
    const F u = mul(add(to_float(right<9>(h)), spread(0.5f)), spread(0x1p-23f));
    z = sub(z, logarithm(sub(zero(), logarithm(u))));
    float all[LANES];
    store(all, z);
    for (int j = 0; j < m; j++)
      if (all[j] > best) best = all[j], winner = i + j;
  });
  return winner;
}

}  // namespace
}  // namespace septet

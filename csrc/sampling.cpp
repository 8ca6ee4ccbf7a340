// See sampling.h.
#include "sampling.h"

#include <math.h>

#include <algorithm>

namespace septet {
namespace {

constexpr float THRESHOLDS[] = {1e-2f, 1e-4f, 1e-7f, 0.0f};  // of the likeliest token's probability

uint32_t mix(uint32_t h) {
  h = (h ^ h >> 16) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  return h ^ h >> 16;
}

float noise(const Sampling& how, uint32_t token) {
  const uint64_t s = static_cast<uint64_t>(how.seed);
  const uint32_t high = static_cast<uint32_t>(s >> 32) + static_cast<uint32_t>(static_cast<uint64_t>(how.position) * 0x9E3779B9u);
  const uint32_t h = mix(mix(static_cast<uint32_t>(s) ^ mix(high)) + token * 0x85EBCA6Bu);
  const float u = (static_cast<float>(h >> 9) + 0.5f) * 0x1p-23f;
  return -logf(-logf(u));
}

void gather(const std::vector<float>& weight, float least, std::vector<uint32_t>& tokens) {
  constexpr size_t STEP = 32;
  tokens.clear();
  const size_t n = weight.size();
  for (size_t i = 0; i < n; i += STEP) {
    const size_t end = std::min(i + STEP, n);
    bool some = false;
    for (size_t j = i; j < end; j++) some |= weight[j] >= least;
    if (!some) continue;
    for (size_t j = i; j < end; j++)
      if (weight[j] >= least) tokens.push_back(static_cast<uint32_t>(j));
  }
}

double sum_of(const std::vector<float>& weight, const std::vector<uint32_t>& tokens) {
  double sum = 0;
  for (uint32_t token : tokens) sum += weight[token];
  return sum;
}

double sum_of(const std::vector<float>& weight) {
  double sums[4] = {};
  size_t i = 0;
  for (; i + 4 <= weight.size(); i += 4)
    for (size_t j = 0; j < 4; j++) sums[j] += weight[i + j];
  for (; i < weight.size(); i++) sums[0] += weight[i];
  return sums[0] + sums[1] + sums[2] + sums[3];
}

}  // namespace

void forbid(float* logits, int64_t n, const uint32_t* words) {
  for (int64_t i = 0; i < n; i += 32) {
    const uint32_t word = words[i / 32];
    const int64_t m = std::min<int64_t>(32, n - i);
    float* x = logits + i;
    if (word == 0) {
      std::fill(x, x + m, -INFINITY);
    } else if (word != ~0u) {
      for (int64_t j = 0; j < m; j++) x[j] = word >> j & 1 ? x[j] : -INFINITY;
    }
  }
}

bool keep(const StepKernels& kernels, const float* logits, int64_t n, const Sampling& how, SamplingScratch& scratch) {
  const int64_t top = kernels.argmax(logits, n);
  if (top < 0) return false;
  scratch.fit(n);
  std::vector<float>& weight = scratch.weight;
  std::vector<uint32_t>& tokens = scratch.tokens;
  if (!isfinite(logits[top])) {  // all excluded, or an infinity: the first of the largest
    tokens.assign(1, static_cast<uint32_t>(top));
    return true;
  }
  kernels.exps(logits, n, logits[top], 1.0f / how.temperature, weight.data());
  for (int64_t i = 0; i < n; i++)
    if (logits[i] == -INFINITY) weight[i] = -1.0f;  // never a candidate
  const size_t most = how.top_k > 0 && how.top_k < n ? static_cast<size_t>(how.top_k) : static_cast<size_t>(n);
  const bool by_rank = most < static_cast<size_t>(n), by_mass = how.top_p < 1.0f;
  double total = by_rank || !by_mass ? 0.0 : sum_of(weight) + static_cast<double>(std::count(weight.begin(), weight.end(), -1.0f));
  for (float least : THRESHOLDS) {
    if (!by_rank && !by_mass) least = 0.0f;
    gather(weight, least, tokens);
    if (least == 0.0f || (by_rank && tokens.size() >= most) || (!by_rank && sum_of(weight, tokens) >= how.top_p * total)) break;
  }
  const auto likelier = [&](uint32_t a, uint32_t b) { return weight[a] > weight[b] || (weight[a] == weight[b] && a < b); };
  if (by_rank || by_mass) {
    const size_t ranked = std::min(most, tokens.size());
    std::partial_sort(tokens.begin(), tokens.begin() + static_cast<int64_t>(ranked), tokens.end(), likelier);
    tokens.resize(ranked);
    if (by_rank) total = sum_of(weight, tokens);
  }
  double before = 0;
  size_t kept = 0;
  for (uint32_t token : tokens) {
    if (by_mass && kept && before >= how.top_p * total) break;
    before += weight[token];
    if (weight[token] >= how.min_p) tokens[kept++] = token;
    else if (by_rank || by_mass) break;
  }
  tokens.resize(kept);
  return true;
}

int64_t choose(const StepKernels& kernels, const float* logits, int64_t n, const Sampling& how, SamplingScratch& scratch) {
  if (how.temperature <= 0.0f) return kernels.argmax(logits, n);
  if (how.top_k <= 0 && how.top_p >= 1.0f && how.min_p <= 0.0f)
    return kernels.gumbel_argmax(logits, n, how.temperature, how.seed, how.position);
  if (!keep(kernels, logits, n, how, scratch)) return -1;
  int64_t winner = scratch.tokens.front();
  float best = -INFINITY;
  for (uint32_t token : scratch.tokens) {
    const float z = logits[token] / how.temperature + noise(how, token);
    if (z > best || (z == best && token < winner)) best = z, winner = token;
  }
  return winner;
}

}  // namespace septet

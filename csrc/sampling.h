// One row of logits to one token: temperature, top-k, top-p, min-p, Gumbel noise. Called by tape.cpp and api_tape.cpp.
//
// Semantics: engine/sampler.py and Ops.gumbel_argmax. Knows no rows, threads or models.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "step_kernels.h"

namespace septet {

struct Sampling {
  float temperature;  // 0 = greedy, whatever the rest says
  int64_t top_k;      // 0 = off
  float top_p, min_p; // 1, 0 = off
  int64_t seed, position;
};

// Memory of one thread; `fit` before the first use of a vocabulary.
struct SamplingScratch {
  std::vector<float> weight;    // (n) e^((x - largest) / temperature)
  std::vector<uint32_t> tokens; // candidates
  void fit(int64_t n) { weight.resize(static_cast<size_t>(n)), tokens.reserve(static_cast<size_t>(n)); }
};

// -inf for the tokens whose bit is not set in `words` (ceil(n / 32)), least significant first. See Ops.apply_mask.
void forbid(float* logits, int64_t n, const uint32_t* words);

// The tokens that top-k, top-p and min-p leave, into scratch.tokens, at least one. temperature > 0. False: a NaN.
bool keep(const StepKernels& kernels, const float* logits, int64_t n, const Sampling& how, SamplingScratch& scratch);

// The token, or -1 where there is a NaN.
int64_t choose(const StepKernels& kernels, const float* logits, int64_t n, const Sampling& how, SamplingScratch& scratch);

}  // namespace septet

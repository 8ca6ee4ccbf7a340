// The AVX2 matrix kernels (Haswell, Zen 1-3): unsigned codes by signed activations with VPMADDUBSW, no VNNI.
//
// Registers: 16 rows are two vectors. `direct` decodes weights in registers for up to 4 tokens; for more, panel_avx2.h decodes
// a group once and multiplies it by four tokens at a time. Both end in the same `finish` (codes_avx2.h): one fma per block
// and output, in order of the blocks, so that a token's result does not depend on its neighbours.
#include "codes_avx2.h"
#include "pairs_avx2.h"
#include "panel_avx2.h"
#include "store_avx2.h"

namespace septet {
namespace {

constexpr int DIRECT = 4;                   // tokens up to which decoding in registers wins
constexpr int64_t CHUNK_BYTES = 192 << 10;  // of quantised input that a panel's pass should find in L2

template <Form F, int R, int J, int L>
inline void direct_lines(const Decoder<F>& decoder, Sums (&sums)[R], const InputBlock<L>& x) {
  if constexpr (Traits<F>::bytes) {
    for (int i = 2 * J; i < 2 * J + 2; i++) {
      const I8 codes = load(decoder.block + 64 * i + 32 * decoder.v);
      for (int t = 0; t < R; t++) add_line<F>(sums[t], codes, spread(x.q[i][t]), i);
    }
  } else {
    I8 low, high;
    decoder.template lines<J>(low, high);
    for (int t = 0; t < R; t++) add_line<F>(sums[t], low, spread(x.q[J][t]), J);
    for (int t = 0; t < R; t++) add_line<F>(sums[t], high, spread(x.q[4 + J][t]), 4 + J);
  }
}

// A group's vectors v0 .. v0 + V - 1 (8 rows each) by R tokens of L lanes, weights decoded in registers. x: the tokens' first
// block. c (R, 16).
template <Form F, int R, int L, int V>
APART void direct(const uint8_t* group, const InputBlock<L>* x, int64_t blocks, int v0, float* c) {
  constexpr Shape shape = Traits<F>::shape;
  F8 acc[R][V];
  for (int t = 0; t < R; t++)
    for (int v = 0; v < V; v++) acc[t][v] = _mm256_setzero_ps();
  const uint8_t* p = group;
  const uint8_t* head = group;
  for (int64_t b = 0; b < blocks; b++, p += shape.block(), x++) {
    if constexpr (shape.head != 0) {
      if (b % 8 == 0) head = p, p += shape.head;
    }
    for (int line = 0; v0 == 0 && line < shape.block(); line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD + line), _MM_HINT_T0);
    for (int v = 0; v < V; v++) {
      Sums sums[R];
      for (int t = 0; t < R; t++) sums[t] = start<F>(*x, t);
      const Decoder<F> decoder(p, v0 + v);
      direct_lines<F, R, 0>(decoder, sums, *x);
      direct_lines<F, R, 1>(decoder, sums, *x);
      direct_lines<F, R, 2>(decoder, sums, *x);
      direct_lines<F, R, 3>(decoder, sums, *x);
      const Scales scales = read_scales<F>(head, p, v0 + v);
      for (int t = 0; t < R; t++) acc[t][v] = finish<F>(acc[t][v], sums[t], scales, *x, t);
    }
  }
  for (int t = 0; t < R; t++)
    for (int v = 0; v < V; v++) _mm256_storeu_ps(c + 16 * t + 8 * (v0 + v), acc[t][v]);
}

// One pass over the weights for one token, which memory bounds; for more a pass for each vector, whose sums fit the registers
// (those of two tokens by int8 weights fit anyway).
template <Form F, int R, int L>
inline void direct_rows(const uint8_t* group, const InputBlock<L>* x, int64_t blocks, float* c) {
  if constexpr (R == 1 || (R == 2 && Traits<F>::bytes)) direct<F, R, L, 2>(group, x, blocks, 0, c);
  else direct<F, R, L, 1>(group, x, blocks, 0, c), direct<F, R, L, 1>(group, x, blocks, 1, c);
}

// -- quantised weights ------------------------------------------------------------------------------------------------
inline const InputBlock<4>* four(const QuantInput& qx, int64_t t) {
  return reinterpret_cast<const InputBlock<4>*>(qx.data) + t / 4 * qx.blocks;
}

// 1 .. 4 tokens from t on, t a multiple of 4.
template <Form F>
void direct_any(const uint8_t* group, const QuantInput& qx, int64_t t, int64_t count, float* c) {
  if (qx.lanes == 1) direct_rows<F, 1, 1>(group, reinterpret_cast<const InputBlock<1>*>(qx.data), qx.blocks, c);
  else if (count == 1) direct_rows<F, 1, 4>(group, four(qx, t), qx.blocks, c);
  else if (count == 2) direct_rows<F, 2, 4>(group, four(qx, t), qx.blocks, c);
  else if (count == 3) direct_rows<F, 3, 4>(group, four(qx, t), qx.blocks, c);
  else direct_rows<F, 4, 4>(group, four(qx, t), qx.blocks, c);
}

template <Form F>
void direct_groups(const Packed& w, const QuantInput& qx, int64_t t_count, int64_t g0, int64_t g1, const Out& out) {
  alignas(64) float c[4 * GROUP];
  for (int64_t g = g0; g < g1; g++)
    for (int64_t t = 0; t < t_count; t += 4) {
      const int64_t count = t_count - t < 4 ? t_count - t : 4;
      direct_any<F>(w.data + g * w.group_bytes, qx, t, count, c);
      store_group(w, g, c, t, count, out);
    }
}

// What a pass over many tokens needs besides weights and inputs. `step`: blocks of a panel; `chunk`: tokens that share it;
// `sums` (chunk, 16): an output's sums, from one panel to the next of its group; `wide`: the inputs as int8 weights or pairs
// want them.
template <Form F, typename Wide = WideBlock>
struct PanelPlan {
  int64_t step, chunk;
  PanelBlock<F>* panel;
  float* sums;
  Wide* wide;

  PanelPlan(int64_t blocks, int64_t t_count, int64_t wide_count) {
    const int64_t parts = (blocks + PANEL_BLOCKS<F> - 1) / PANEL_BLOCKS<F>, even = (blocks + parts - 1) / parts;
    step = parts == 1 ? blocks : (even + 7) / 8 * 8;
    const int64_t fit = CHUNK_BYTES / (blocks * static_cast<int64_t>(sizeof(PanelInput<F>))) * 4, most = fit < 64 ? 64 : fit;
    chunk = t_count < most ? (t_count + 3) / 4 * 4 : most;
    const int64_t wide_bytes = chunk / 4 * wide_count * static_cast<int64_t>(sizeof(Wide));
    const int64_t panel_bytes = (step + step % 2) * static_cast<int64_t>(sizeof(PanelBlock<F>));  // pairs of blocks, too
    char* memory = static_cast<char*>(thread_scratch(panel_bytes + chunk * GROUP * 4 + wide_bytes));
    panel = reinterpret_cast<PanelBlock<F>*>(memory);
    sums = memory ? reinterpret_cast<float*>(memory + panel_bytes) : nullptr;
    wide = memory ? reinterpret_cast<Wide*>(memory + panel_bytes + chunk * GROUP * 4) : nullptr;
  }
};

// Group g by tokens begin .. end - 1 of a chunk.
template <Form F, typename Wide>
void panel_group(const Packed& w, const QuantInput& qx, const PanelPlan<F, Wide>& plan, int64_t g, int64_t begin, int64_t end, const Out& out) {
  for (int64_t b = 0; b < qx.blocks; b += plan.step) {
    const int64_t blocks = qx.blocks - b < plan.step ? qx.blocks - b : plan.step;
    unpack<F>(w.data + g * w.group_bytes, b, blocks, plan.panel);
    for (int64_t t = begin; t < end; t += 4) {
      const int64_t count = end - t < 4 ? end - t : 4;
      float* c = plan.sums + (plan.step < qx.blocks ? t - begin : 0) * GROUP;
      if (b + blocks == qx.blocks) ask_for(g, t, count, out);
      if constexpr (Traits<F>::bytes) tile_any<F>(plan.panel, plan.wide + (t - begin) / 4 * qx.blocks + b, blocks, count, b == 0, c);
      else tile_any<F>(plan.panel, four(qx, t) + b, blocks, count, b == 0, c);
      if (b + blocks == qx.blocks) store_group(w, g, c, t, count, out);
    }
  }
}

template <Form F>
void quantized(const Packed& w, const QuantInput& qx, int64_t t_count, int64_t g0, int64_t g1, const Out& out) {
  if (t_count <= DIRECT) return direct_groups<F>(w, qx, t_count, g0, g1, out);
  const PanelPlan<F> plan(qx.blocks, t_count, Traits<F>::bytes ? qx.blocks : 0);
  if (!plan.panel) return direct_groups<F>(w, qx, t_count, g0, g1, out);  // no memory
  for (int64_t begin = 0; begin < t_count; begin += plan.chunk) {
    const int64_t end = t_count - begin < plan.chunk ? t_count : begin + plan.chunk;
    if constexpr (Traits<F>::bytes) widen(four(qx, begin), (end - begin + 3) / 4 * qx.blocks, plan.wide);
    for (int64_t g = g0; g < g1; g++) panel_group<F>(w, qx, plan, g, begin, end, out);
  }
}

// -- q4_w -------------------------------------------------------------------------------------------------------------
using PairPlan = PanelPlan<Form::q4_0, PairInput>;
static_assert(sizeof(PairBlock) <= 2 * sizeof(PanelBlock<Form::q4_0>), "panels of both kinds share memory");

inline const uint8_t* tail_of(const Packed& w, int64_t g) { return w.data + (g + 1) * w.group_bytes - TAIL; }
inline bool has_units(const uint8_t* tail) { return tail[0] | tail[1]; }

void pair_direct_any(const uint8_t* group, const QuantInput& qx, int64_t t, int64_t count, float* c) {
  if (qx.lanes == 1) pair_direct_rows<1, 1>(group, reinterpret_cast<const InputBlock<1>*>(qx.data), qx.blocks, c);
  else if (count == 1) pair_direct_rows<1, 4>(group, four(qx, t), qx.blocks, c);
  else if (count == 2) pair_direct_rows<2, 4>(group, four(qx, t), qx.blocks, c);
  else if (count == 3) pair_direct_rows<3, 4>(group, four(qx, t), qx.blocks, c);
  else pair_direct_rows<4, 4>(group, four(qx, t), qx.blocks, c);
}

void paired_direct(const Packed& w, const QuantInput& qx, int64_t t_count, int64_t g0, int64_t g1, const Out& out) {
  alignas(64) float c[4 * GROUP];
  for (int64_t g = g0; g < g1; g++)
    for (int64_t t = 0; t < t_count; t += 4) {
      const uint8_t* group = w.data + g * w.group_bytes;
      const int64_t count = t_count - t < 4 ? t_count - t : 4;
      if (has_units(tail_of(w, g))) pair_direct_any(group, qx, t, count, c), in_ones(tail_of(w, g), count, c);
      else direct_any<Form::q4_0>(group, qx, t, count, c);
      store_group(w, g, c, t, count, out);
    }
}

void pair_group(const Packed& w, const QuantInput& qx, const PairPlan& plan, int64_t g, int64_t begin, int64_t end, const Out& out) {
  PairBlock* panel = reinterpret_cast<PairBlock*>(plan.panel);
  const int64_t pairs = (qx.blocks + 1) / 2;
  for (int64_t b = 0; b < qx.blocks; b += plan.step) {
    const int64_t blocks = qx.blocks - b < plan.step ? qx.blocks - b : plan.step;
    unpack_pairs(w.data + g * w.group_bytes, b, blocks, panel);
    for (int64_t t = begin; t < end; t += 4) {
      const int64_t count = end - t < 4 ? end - t : 4;
      float* c = plan.sums + (plan.step < qx.blocks ? t - begin : 0) * GROUP;
      const bool last = b + blocks == qx.blocks;
      if (last) ask_for(g, t, count, out);
      pair_tiles(panel, plan.wide + (t - begin) / 4 * pairs + b / 2, (blocks + 1) / 2, count, b == 0, c);
      if (!last) continue;
      in_ones(tail_of(w, g), count, c);
      store_group(w, g, c, t, count, out);
    }
  }
}

void paired(const Packed& w, const QuantInput& qx, int64_t t_count, int64_t g0, int64_t g1, const Out& out) {
  if (t_count <= DIRECT) return paired_direct(w, qx, t_count, g0, g1, out);
  const int64_t pairs = (qx.blocks + 1) / 2;
  const PairPlan plan(qx.blocks, t_count, pairs);
  if (!plan.panel) return paired_direct(w, qx, t_count, g0, g1, out);  // no memory
  for (int64_t begin = 0; begin < t_count; begin += plan.chunk) {
    const int64_t end = t_count - begin < plan.chunk ? t_count : begin + plan.chunk;
    for (int64_t t = begin; t < end; t += 4) pair_up(four(qx, t), qx.blocks, plan.wide + (t - begin) / 4 * pairs);
    for (int64_t g = g0; g < g1; g++) {
      if (has_units(tail_of(w, g))) pair_group(w, qx, plan, g, begin, end, out);
      else panel_group<Form::q4_0>(w, qx, plan, g, begin, end, out);
    }
  }
}

void linear(const Packed& w, const QuantInput& qx, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1,
            float* y, int64_t ldy, const float* bias) {
  const Out out{y, ldy, bias};
  switch (w.form) {
    case Form::q4_w: return paired(w, qx, t_count, g0, g1, out);
    case Form::q4_1: return quantized<Form::q4_1>(w, qx, t_count, g0, g1, out);
    case Form::q5_0: return quantized<Form::q5_0>(w, qx, t_count, g0, g1, out);
    case Form::q5_1: return quantized<Form::q5_1>(w, qx, t_count, g0, g1, out);
    case Form::q8_0: return quantized<Form::q8_0>(w, qx, t_count, g0, g1, out);
    case Form::q4_k: return quantized<Form::q4_k>(w, qx, t_count, g0, g1, out);
    case Form::q5_k: return quantized<Form::q5_k>(w, qx, t_count, g0, g1, out);
    case Form::q6_k: return quantized<Form::q6_k>(w, qx, t_count, g0, g1, out);
    case Form::q2_k: return quantized<Form::q2_k>(w, qx, t_count, g0, g1, out);
    case Form::q8_f: return quantized<Form::q8_f>(w, qx, t_count, g0, g1, out);
    default: return avx2_dense(w, x, ldx, t_count, g0, g1, y, ldy, bias);
  }
}

constexpr Kernels AVX2 = {Path::avx2, avx2_quantize, linear};

}  // namespace

const Kernels* avx2_kernels() { return &AVX2; }

}  // namespace septet

// Q4_0 on AVX2, two blocks at a time: both blocks' sums lie side by side as int16, and one VPMADDWD multiplies each by its
// scale and adds them. Included by linear_avx2.cpp; the layout (Form::q4_w: scales are whole multiples of a power of two of
// their row) is pack.h's.
//
// A block's end is four operations for 32 inputs otherwise, three for 64 here: measured 36 and 43.5 MAC a cycle of 48
// without any end. Both blocks of a pair share their activation scale (linear.h), so that the sum of 64 inputs is one
// whole number: at most 2 * 32,512 * 32,767 < 2**31.
#pragma once

#include "panel_avx2.h"

namespace septet {
namespace {

constexpr int BLOCK_BYTES = shape_of(Form::q4_w).block();

// Two blocks of a panel, A and B: line 2i has inputs 4i, 4i + 1 of A, then those of B; line 2i + 1 has 4i + 2 and 4i + 3.
struct alignas(64) PairBlock {
  uint8_t codes[1024];
  int16_t scales[2][16];  // [vector][row][A, B]
};

// Four tokens' inputs in the same order.
struct PairInput {
  int32_t q[16][4];  // [line][token]
  int32_t less8[4];  // two int16: -8 times the sums of A's and B's inputs
  float d[4];
};

// The upper (lower) half of each 32 bits from b, the other from a's lower (upper).
inline I8 low_halves(I8 a, I8 b) { return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa); }
inline I8 high_halves(I8 a, I8 b) { return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa); }
inline __m128i load4(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline void pair_up(const InputBlock<4>* x, int64_t blocks, PairInput* out) {
  const InputBlock<4> nothing{};
  for (int64_t b = 0; b < blocks; b += 2, x += 2, out++) {
    const InputBlock<4>& other = b + 1 < blocks ? x[1] : nothing;
    for (int i = 0; i < 8; i += 2) {
      const I8 a = load(x->q[i]), c = load(other.q[i]), low = low_halves(a, c), high = high_halves(a, c);
      _mm256_storeu_si256(reinterpret_cast<I8*>(out->q[2 * i]), _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_storeu_si256(reinterpret_cast<I8*>(out->q[2 * i + 2]), _mm256_permute2x128_si256(low, high, 0x31));
    }
    const auto less = [](const InputBlock<4>& from) { return _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(load4(from.sum), 3)); };
    const __m128i both = _mm_blend_epi16(less(*x), _mm_slli_epi32(less(other), 16), 0xaa);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out->less8), both);
    memcpy(out->d, x->d, sizeof out->d);
  }
}

// Scales of vector v's rows in the blocks at a and b, side by side.
inline I8 side_by_side(const uint8_t* a, const uint8_t* b, int v) {
  const __m128i x = load4(a + 256 + 16 * v), y = load4(b + 256 + 16 * v);
  return _mm256_set_m128i(_mm_unpackhi_epi16(x, y), _mm_unpacklo_epi16(x, y));
}

template <int J>
inline void pair_lines(const Decoder<Form::q4_0>& a, const Decoder<Form::q4_0>& b, PairBlock& out) {
  I8 low[2], high[2];
  a.template lines<J>(low[0], high[0]);
  b.template lines<J>(low[1], high[1]);
  uint8_t* to = out.codes + 32 * a.v;
  _mm256_store_si256(reinterpret_cast<I8*>(to + 128 * J), low_halves(low[0], low[1]));
  _mm256_store_si256(reinterpret_cast<I8*>(to + 128 * J + 64), high_halves(low[0], low[1]));
  _mm256_store_si256(reinterpret_cast<I8*>(to + 128 * (4 + J)), low_halves(high[0], high[1]));
  _mm256_store_si256(reinterpret_cast<I8*>(to + 128 * (4 + J) + 64), high_halves(high[0], high[1]));
}

// Blocks first .. first + count - 1 of a group, `first` even; count may be odd at the group's end only.
inline void unpack_pairs(const uint8_t* group, int64_t first, int64_t count, PairBlock* panel) {
  alignas(32) static constexpr uint8_t NOTHING[BLOCK_BYTES] = {};
  const uint8_t* p = group + first * BLOCK_BYTES;
  for (int64_t b = 0; b < count; b += 2, p += 2 * BLOCK_BYTES, panel++) {
    const uint8_t* other = b + 1 < count ? p + BLOCK_BYTES : NOTHING;
    for (int v = 0; v < 2; v++) {
      const Decoder<Form::q4_0> x(p, v), y(other, v);
      pair_lines<0>(x, y, *panel);
      pair_lines<1>(x, y, *panel);
      pair_lines<2>(x, y, *panel);
      pair_lines<3>(x, y, *panel);
      _mm256_store_si256(reinterpret_cast<I8*>(panel->scales[v]), side_by_side(p, other, v));
    }
  }
}

// A panel by R tokens -> c (R, 16), in units of each row; see `tile`.
template <int R>
APART void pair_tile(const PairBlock* panel, const PairInput* x, int64_t pairs, bool first, float* c) {
  F8 acc[R][2];
  for (int t = 0; t < R; t++)
    for (int v = 0; v < 2; v++) acc[t][v] = first ? _mm256_setzero_ps() : _mm256_load_ps(c + 16 * t + 8 * v);
  for (int64_t b = 0; b < pairs; b++, panel++, x++) {
    I8 sums[R][2];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      const I8 w[2] = {load(panel->codes + 64 * i), load(panel->codes + 64 * i + 32)};
#pragma GCC unroll 4
      for (int t = 0; t < R; t++) {
        const I8 in = spread(&x->q[i][t]);
        for (int v = 0; v < 2; v++) {
          if (i == 0) sums[t][v] = spread(&x->less8[t]);
          sums[t][v] = _mm256_add_epi16(sums[t][v], _mm256_maddubs_epi16(w[v], in));
          KEEP(sums[t][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < R; t++)
      for (int v = 0; v < 2; v++) {
        const I8 total = _mm256_madd_epi16(sums[t][v], load(panel->scales[v]));
        acc[t][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_broadcast_ss(&x->d[t]), acc[t][v]);
        KEEP(acc[t][v]);
      }
  }
  for (int t = 0; t < R; t++)
    for (int v = 0; v < 2; v++) _mm256_store_ps(c + 16 * t + 8 * v, acc[t][v]);
}

inline void pair_tiles(const PairBlock* panel, const PairInput* x, int64_t pairs, int64_t count, bool first, float* c) {
  if (count == 1) pair_tile<1>(panel, x, pairs, first, c);
  else if (count == 2) pair_tile<2>(panel, x, pairs, first, c);
  else if (count == 3) pair_tile<3>(panel, x, pairs, first, c);
  else pair_tile<4>(panel, x, pairs, first, c);
}

// c (count, 16) in units of each row -> outputs. `tail`: the end of the group.
inline F8 unit_of(const uint8_t* tail, int v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load4(tail + 16 * v)), 16));
}
inline void in_ones(const uint8_t* tail, int64_t count, float* c) {
  const F8 low = unit_of(tail, 0), high = unit_of(tail, 1);
  for (int64_t t = 0; t < count; t++, c += 16) {
    _mm256_store_ps(c, _mm256_mul_ps(_mm256_load_ps(c), low));
    _mm256_store_ps(c + 8, _mm256_mul_ps(_mm256_load_ps(c + 8), high));
  }
}

// -- weights decoded in registers, for up to four tokens --------------------------------------------------------------
// The sums of vectors v0 .. v0 + V - 1 (8 rows each) of one block by R tokens, times the block's scales.
template <int R, int L, int V>
inline void scaled_block(const uint8_t* p, int v0, const InputBlock<L>& x, I8 (&total)[R][V]) {
  I8 sums[R][V];
  for (int t = 0; t < R; t++)
    for (int v = 0; v < V; v++) sums[t][v] = spread(&x.less8[t]);
  const auto add = [&](const I8 (&codes)[V], int i) {
    for (int t = 0; t < R; t++) {
      const I8 in = spread(x.q[i][t]);
      for (int v = 0; v < V; v++) {
        sums[t][v] = _mm256_add_epi16(sums[t][v], _mm256_maddubs_epi16(codes[v], in));
        KEEP(sums[t][v]);
      }
    }
  };
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    I8 low[V], high[V];
    for (int v = 0; v < V; v++) {
      const I8 raw = load(p + 64 * j + 32 * (v0 + v)), nibble = _mm256_set1_epi8(15);
      low[v] = _mm256_and_si256(raw, nibble), high[v] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble);
    }
    add(low, j);
    add(high, 4 + j);
  }
  for (int v = 0; v < V; v++) {
    const I8 scales = side_by_side(p, p, v0 + v);
    for (int t = 0; t < R; t++) total[t][v] = _mm256_madd_epi16(sums[t][v], scales);
  }
}

template <int R, int L, int V>
inline void take_in(F8 (&acc)[R][V], const I8 (&total)[R][V], const InputBlock<L>& x) {
  for (int t = 0; t < R; t++)
    for (int v = 0; v < V; v++) acc[t][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[t][v]), _mm256_broadcast_ss(&x.d[t]), acc[t][v]);
}

template <int R, int L, int V>
APART void pair_direct(const uint8_t* group, const InputBlock<L>* x, int64_t blocks, int v0, float* c) {
  F8 acc[R][V];
  for (int t = 0; t < R; t++)
    for (int v = 0; v < V; v++) acc[t][v] = _mm256_setzero_ps();
  const uint8_t* p = group;
  I8 total[R][V];
  for (int64_t b = 0; b + 2 <= blocks; b += 2, p += 2 * BLOCK_BYTES, x += 2) {
    for (int line = 0; v0 == 0 && line < 2 * BLOCK_BYTES; line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD + line), _MM_HINT_T0);
    I8 more[R][V];
    scaled_block<R, L, V>(p, v0, x[0], total);
    scaled_block<R, L, V>(p + BLOCK_BYTES, v0, x[1], more);
    for (int t = 0; t < R; t++)
      for (int v = 0; v < V; v++) total[t][v] = _mm256_add_epi32(total[t][v], more[t][v]);
    take_in(acc, total, *x);
  }
  if (blocks % 2) {
    scaled_block<R, L, V>(p, v0, *x, total);
    take_in(acc, total, *x);
  }
  for (int t = 0; t < R; t++)
    for (int v = 0; v < V; v++) _mm256_store_ps(c + 16 * t + 8 * (v0 + v), acc[t][v]);
}

template <int R, int L>
inline void pair_direct_rows(const uint8_t* group, const InputBlock<L>* x, int64_t blocks, float* c) {
  if constexpr (R <= 2) pair_direct<R, L, 2>(group, x, blocks, 0, c);
  else pair_direct<R, L, 1>(group, x, blocks, 0, c), pair_direct<R, L, 1>(group, x, blocks, 1, c);
}

}  // namespace
}  // namespace septet

// Panels of the AVX2 matrix kernels: a group's weights decoded once into scratch that L1 holds, then multiplied by many
// tokens, four at a time. Included by linear_avx2.cpp. See codes_avx2.h for what the numbers may be.
//
// What bounds a tile on Zen 3 (measured): VPMADDUBSW or VPMADDWD with its addition takes 0.6 cycles, not the 0.5 of the two
// multipliers, since additions take their turns on them; loads and broadcasts are free beside that. A block's end (four
// operations for each 8 outputs) is a fifth of a tile.
#pragma once

#include <type_traits>

#include "codes_avx2.h"

namespace septet {
namespace {

// A block of a panel: lines of codes (16 rows by 4 inputs, a byte each; int8 weights: by 2 inputs, int16), then the scales as
// `finish` wants them.
template <Form F>
struct alignas(64) PanelBlock {
  using T = Traits<F>;
  static constexpr int LINES = T::bytes ? 16 : 8;
  static constexpr int SCALES = T::six ? (T::minima ? 5 : 3) : T::minima ? 2 : 1;
  uint8_t codes[64 * LINES];
  float scales[2][SCALES][8];

  void put(int v, const Scales& s) {
    _mm256_store_ps(scales[v][0], s.d);
    if constexpr (T::minima) _mm256_store_ps(scales[v][SCALES - 1], s.m);
    if constexpr (T::six) {
      _mm256_store_si256(reinterpret_cast<I8*>(scales[v][1]), s.s0);
      _mm256_store_si256(reinterpret_cast<I8*>(scales[v][2]), s.s1);
      if constexpr (T::minima) _mm256_store_si256(reinterpret_cast<I8*>(scales[v][3]), s.m01);
    }
  }
  Scales get(int v) const {
    Scales s;
    s.d = _mm256_load_ps(scales[v][0]);
    if constexpr (T::minima) s.m = _mm256_load_ps(scales[v][SCALES - 1]);
    if constexpr (T::six) {
      s.s0 = load(scales[v][1]), s.s1 = load(scales[v][2]);
      if constexpr (T::minima) s.m01 = load(scales[v][3]);
    }
    return s;
  }
};

constexpr int64_t AHEAD = 4096;  // bytes of prefetch in the stream of weights

// Blocks of a panel at most, so that it lies in L1 beside four tokens' inputs.
template <Form F>
constexpr int64_t PANEL_BLOCKS = Traits<F>::bytes ? 20 : 24;

// Int8 weights meet inputs as int16: inputs 4i, 4i + 2 in line 2i, and 4i + 1, 4i + 3 in line 2i + 1.
struct WideBlock {
  int32_t q[16][4];  // [line][token]
  float d[4];
};

inline I8 even_bytes(I8 x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
inline I8 odd_bytes(I8 x) { return _mm256_srai_epi16(x, 8); }

inline void widen(const InputBlock<4>* x, int64_t blocks, WideBlock* out) {
  for (int64_t b = 0; b < blocks; b++, x++, out++) {
    for (int i = 0; i < 8; i += 2) {
      const I8 two = load(x->q[i]), even = even_bytes(two), odd = odd_bytes(two);
      _mm256_storeu_si256(reinterpret_cast<I8*>(out->q[2 * i]), _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(reinterpret_cast<I8*>(out->q[2 * i + 2]), _mm256_permute2x128_si256(even, odd, 0x31));
    }
    memcpy(out->d, x->d, sizeof out->d);
  }
}

template <Form F, int J>
inline void unpack_lines(const Decoder<F>& decoder, PanelBlock<F>& out) {
  I8 low, high;
  decoder.template lines<J>(low, high);
  _mm256_store_si256(reinterpret_cast<I8*>(out.codes + 64 * J + 32 * decoder.v), low);
  _mm256_store_si256(reinterpret_cast<I8*>(out.codes + 64 * (4 + J) + 32 * decoder.v), high);
}

// Blocks first .. first + count - 1 of a group; `first` is a multiple of 8.
template <Form F>
void unpack(const uint8_t* group, int64_t first, int64_t count, PanelBlock<F>* panel) {
  constexpr Shape shape = Traits<F>::shape;
  const uint8_t* p = group + first * shape.block() + first / 8 * shape.head;
  const uint8_t* head = p;
  for (int64_t b = 0; b < count; b++, p += shape.block(), panel++) {
    if constexpr (shape.head != 0) {
      if (b % 8 == 0) head = p, p += shape.head;
    }
    for (int v = 0; v < 2; v++) {
      panel->put(v, read_scales<F>(head, p, v));
      if constexpr (Traits<F>::bytes) {
        for (int i = 0; i < 8; i++) {
          const I8 raw = load(p + 64 * i + 32 * v);
          _mm256_store_si256(reinterpret_cast<I8*>(panel->codes + 128 * i + 32 * v), even_bytes(raw));
          _mm256_store_si256(reinterpret_cast<I8*>(panel->codes + 128 * i + 64 + 32 * v), odd_bytes(raw));
        }
      } else {
        const Decoder<F> decoder(p, v);
        unpack_lines<F, 0>(decoder, *panel);
        unpack_lines<F, 1>(decoder, *panel);
        unpack_lines<F, 2>(decoder, *panel);
        unpack_lines<F, 3>(decoder, *panel);
      }
    }
  }
}

// What a panel's lines meet: four tokens' bytes, or the same widened.
template <Form F>
using PanelInput = std::conditional_t<Traits<F>::bytes, WideBlock, InputBlock<4>>;

// A panel's vectors v0 .. v0 + V - 1 (8 rows each) by R tokens -> c (R, 16). Sums of floats begin where the panel before
// ended (`first`: at zero), so that an output's blocks are added one after the other, whatever the panels.
template <Form F, int R, int V>
APART void tile(const PanelBlock<F>* panel, const PanelInput<F>* x, int64_t blocks, int v0, bool first, float* c) {
  F8 acc[R][V];
  for (int t = 0; t < R; t++)
    for (int v = 0; v < V; v++) acc[t][v] = first ? _mm256_setzero_ps() : _mm256_load_ps(c + 16 * t + 8 * (v0 + v));
  for (int64_t b = 0; b < blocks; b++, panel++, x++) {
    Sums sums[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < PanelBlock<F>::LINES; i++) {
      I8 w[V];
      for (int v = 0; v < V; v++) w[v] = load(panel->codes + 64 * i + 32 * (v0 + v));
#pragma GCC unroll 4
      for (int t = 0; t < R; t++) {
        const I8 in = spread(&x->q[i][t]);
        for (int v = 0; v < V; v++) {
          if constexpr (Traits<F>::bytes) {
            const I8 two = _mm256_madd_epi16(w[v], in);
            sums[t][v].a = i ? _mm256_add_epi32(sums[t][v].a, two) : two;
            KEEP(sums[t][v].a);
          } else {
            if (i == 0) sums[t][v] = start<F>(*x, t);
            add_line<F>(sums[t][v], w[v], in, i);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < R; t++)
      for (int v = 0; v < V; v++) {
        acc[t][v] = finish<F>(acc[t][v], sums[t][v], panel->get(v0 + v), *x, t);
        KEEP(acc[t][v]);
      }
  }
  for (int t = 0; t < R; t++)
    for (int v = 0; v < V; v++) _mm256_store_ps(c + 16 * t + 8 * (v0 + v), acc[t][v]);
}

// 1 .. 4 tokens.
template <Form F>
inline void tile_any(const PanelBlock<F>* panel, const PanelInput<F>* x, int64_t blocks, int64_t count, bool first, float* c) {
  if (count == 1) tile<F, 1, 2>(panel, x, blocks, 0, first, c);
  else if (count == 2) tile<F, 2, 2>(panel, x, blocks, 0, first, c);
  else if (count == 3) tile<F, 3, 2>(panel, x, blocks, 0, first, c);
  else tile<F, 4, 2>(panel, x, blocks, 0, first, c);
}

}  // namespace
}  // namespace septet

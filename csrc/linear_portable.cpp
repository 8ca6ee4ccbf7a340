// The portable matrix kernels: plain loops over the packed layout that compilers vectorise. The oracle of the others'
// structure, and the path of machines without AVX2.
#include <math.h>
#include <string.h>

#include "kernel_tables.h"
#include "linear.h"
#include "pack.h"

namespace septet {
namespace {

constexpr float TINY = 1e-30f;  // a block of smaller numbers counts as zero: 127 / it could overflow

int16_t low_half(int32_t two) { return static_cast<int16_t>(two & 0xffff); }
int16_t high_half(int32_t two) { return static_cast<int16_t>(two >> 16); }
int32_t two_halves(int low, int high) {
  return static_cast<int32_t>(static_cast<uint32_t>(high) << 16 | (static_cast<uint32_t>(low) & 0xffff));
}

template <int LANES>
void put(QuantInput& out, int64_t t, int64_t b, const QuantBlock& block) {
  InputBlock<LANES>& to = reinterpret_cast<InputBlock<LANES>*>(out.data)[t / LANES * out.blocks + b];
  const int64_t lane = t % LANES;
  for (int i = 0; i < 8; i++) memcpy(to.q[i][lane], block.q + 4 * i, 4);
  const int low = low_half(block.half[0]) + low_half(block.half[1]), high = high_half(block.half[0]) + high_half(block.half[1]);
  to.d[lane] = block.d;
  to.ds[lane] = block.d * static_cast<float>(low + high);
  to.sum[lane] = low + high;
  to.less8[lane] = two_halves(-8 * low, -8 * high);
  to.half[0][lane] = block.half[0];
  to.half[1][lane] = block.half[1];
}

// `count` numbers (32 at most) at x, by the scale of the `seen` numbers at `shared`, which they are some of.
QuantBlock quantize_block(const float* x, int64_t count, const float* shared, int64_t seen) {
  float biggest = 0, poison = 0;
  for (int64_t i = 0; i < seen; i++) {
    biggest = fmaxf(biggest, fabsf(shared[i]));
    poison += shared[i] * 0.0f;  // NaN where x is not finite
  }
  const bool zero = biggest < TINY || poison != poison;
  const float inverse = zero ? 0.0f : 127.0f / biggest;
  QuantBlock out;
  int lanes[2][2] = {{0, 0}, {0, 0}};
  for (int64_t i = 0; i < BLOCK; i++) {
    const int code = i < count && !zero ? static_cast<int>(rintf(x[i] * inverse)) : 0;
    out.q[i] = static_cast<int8_t>(code);
    lanes[i / 16][i / 2 % 2] += code;
  }
  out.d = (zero ? 0.0f : biggest / 127.0f) + poison;
  for (int h = 0; h < 2; h++) out.half[h] = two_halves(lanes[h][0], lanes[h][1]);
  return out;
}

void quantize(const float* x, int64_t ldx, int64_t k, int64_t t0, int64_t t1, QuantInput& out) {
  for (int64_t t = t0; t < t1; t++)
    for (int64_t b = 0; b < out.blocks; b++) {
      const int64_t left = k - b * BLOCK, pair = b / 2 * 2 * BLOCK, seen = k - pair;
      const float* row = x + t * ldx;
      const QuantBlock block = quantize_block(row + b * BLOCK, left < BLOCK ? left : BLOCK, row + pair, seen < 2 * BLOCK ? seen : 2 * BLOCK);
      if (out.lanes == 1) put<1>(out, t, b, block);
      else put<4>(out, t, b, block);
    }
}

// Token t's block, as it was before it was laid out.
template <int LANES>
QuantBlock get(const QuantInput& qx, int64_t t, int64_t b) {
  const InputBlock<LANES>& from = reinterpret_cast<const InputBlock<LANES>*>(qx.data)[t / LANES * qx.blocks + b];
  const int64_t lane = t % LANES;
  QuantBlock out;
  for (int i = 0; i < 8; i++) memcpy(out.q + 4 * i, from.q[i][lane], 4);
  out.d = from.d[lane];
  for (int h = 0; h < 2; h++) out.half[h] = from.half[h][lane];
  return out;
}

// 16 rows x 32 inputs, decoded. Row r's dot product with a token is
// dx * d[r] * (s0 * (w . x over inputs 0-15) + s1 * (.. 16-31)) + dx * m[r] * (m0 * sum of x over 0-15 + m1 * ..).
struct Tile {
  int16_t w[32][16];  // [input][row]
  float d[16], m[16];
  int16_t s[2][16], mn[2][16];
};

void decode_codes(Form form, const Shape& shape, const uint8_t* p, Tile& tile) {
  const int offset = form == Form::q4_0 ? 8 : form == Form::q5_0 ? 16 : shape.bits == 128 ? 32 : 0;
  const uint8_t* bits = p + shape.codes;
  for (int i = 0; i < 8; i++)
    for (int r = 0; r < 16; r++)
      for (int c = 0; c < 4; c++) {
        const int at = 4 * r + c;
        if (shape.codes == 512) {
          tile.w[4 * i + c][r] = static_cast<int8_t>(p[64 * i + at]);
          continue;
        }
        int code = p[64 * (i % 4) + at] >> (i < 4 ? 0 : 4) & 15;
        if (shape.bits == 64) code |= (bits[at] >> i & 1) << 4;
        if (shape.bits == 128) code |= (bits[64 * (i / 4) + at] >> 2 * (i % 4) & 3) << 4;
        tile.w[4 * i + c][r] = static_cast<int16_t>(code - offset);
      }
}

float half_at(const uint8_t* p, int r) {
  uint16_t half;
  memcpy(&half, p + 2 * r, 2);
  return half_to_float(half);
}

// `head`: of the 256 inputs, where the form has one.
void decode_scales(Form form, const Shape& shape, const uint8_t* head, const uint8_t* p, Tile& tile) {
  const uint8_t* scales = p + shape.codes + shape.bits;
  const uint8_t* minima = scales + shape.scales;
  for (int r = 0; r < 16; r++) {
    tile.s[0][r] = tile.s[1][r] = tile.mn[0][r] = tile.mn[1][r] = 1;
    tile.m[r] = 0;
    if (form == Form::q8_f) memcpy(&tile.d[r], scales + 4 * r, 4);
    else tile.d[r] = half_at(shape.head ? head : scales, r);
    if (!shape.head && shape.minima) tile.m[r] = half_at(minima, r);
    if (shape.head == 64) tile.m[r] = -half_at(head + 32, r);
    if (shape.head && shape.scales == 16) {
      tile.d[r] *= scales[r], tile.m[r] *= minima[r];
    } else if (shape.head) {
      for (int h = 0; h < 2; h++) {
        tile.s[h][r] = static_cast<int8_t>(scales[2 * r + h]);
        if (shape.minima) tile.mn[h][r] = minima[2 * r + h];
      }
    }
  }
}

// c[r] += the tile times a token's block.
void multiply(const Shape& shape, const Tile& tile, const QuantBlock& x, float* c) {
  int32_t dot[2][16] = {};
  for (int i = 0; i < 32; i++)
    for (int r = 0; r < 16; r++) dot[i / 16][r] += static_cast<int32_t>(tile.w[i][r]) * x.q[i];
  const bool by_half = shape.bits == 128;
  for (int r = 0; r < 16; r++) {
    const int32_t total = by_half ? dot[0][r] * tile.s[0][r] + dot[1][r] * tile.s[1][r] : dot[0][r] + dot[1][r];
    c[r] += static_cast<float>(total) * x.d * tile.d[r];
  }
  if (!shape.minima) return;
  const int s0 = low_half(x.half[0]) + high_half(x.half[0]), s1 = low_half(x.half[1]) + high_half(x.half[1]);
  for (int r = 0; r < 16; r++) {
    const int32_t below = by_half ? tile.mn[0][r] * s0 + tile.mn[1][r] * s1 : s0 + s1;
    c[r] += static_cast<float>(below) * x.d * tile.m[r];
  }
}

// Tokens t0 .. t0 + count - 1; c (count, 16).
void quantized_group(const Packed& w, const QuantInput& qx, const uint8_t* group, int64_t t0, int64_t count, float* c) {
  const Shape shape = shape_of(w.form);
  const uint8_t* p = group;
  const uint8_t* head = group;
  for (int64_t b = 0; b < qx.blocks; b++, p += shape.block()) {
    if (shape.head && b % 8 == 0) head = p, p += shape.head;
    Tile tile;
    decode_codes(w.form, shape, p, tile);
    decode_scales(w.form, shape, head, p, tile);
    for (int64_t t = 0; t < count; t++)
      multiply(shape, tile, qx.lanes == 1 ? get<1>(qx, t0 + t, b) : get<4>(qx, t0 + t, b), c + t * GROUP);
  }
}

float dense_at(Form form, const uint8_t* group, int64_t i, int r) {
  float value;
  if (form == Form::f32) return memcpy(&value, group + i * 64 + r * 4, 4), value;
  uint16_t half;
  if (form == Form::f16) return half_at(group + i * 32, r);
  memcpy(&half, group + i / 2 * 64 + r * 4 + i % 2 * 2, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  return memcpy(&value, &bits, 4), value;
}

void dense_group(const Packed& w, const float* x, int64_t ldx, const uint8_t* group, int64_t t_count, float* c) {
  for (int64_t i = 0; i < w.k; i++) {
    float column[16];
    for (int r = 0; r < 16; r++) column[r] = dense_at(w.form, group, i, r);
    for (int64_t t = 0; t < t_count; t++)
      for (int r = 0; r < 16; r++) c[t * GROUP + r] += x[t * ldx + i] * column[r];
  }
}

void linear(const Packed& w, const QuantInput& qx, const float* x, int64_t ldx, int64_t t_count, int64_t g0, int64_t g1,
            float* y, int64_t ldy, const float* bias) {
  constexpr int64_t TOKENS = 64;  // that share one decoding
  float c[TOKENS * GROUP];
  for (int64_t g = g0; g < g1; g++)
    for (int64_t t = 0; t < t_count; t += TOKENS) {
      const int64_t count = t_count - t < TOKENS ? t_count - t : TOKENS;
      const int64_t rows = w.n - g * GROUP < GROUP ? w.n - g * GROUP : GROUP;
      const uint8_t* group = w.data + g * w.group_bytes;
      memset(c, 0, sizeof c);
      if (is_dense(w)) dense_group(w, x + t * ldx, ldx, group, count, c);
      else quantized_group(w, qx, group, t, count, c);
      for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; r < rows; r++) {
          const int64_t row = g * GROUP + r;
          y[(t + i) * ldy + row] = c[i * GROUP + r] + (bias ? bias[row] : 0.0f);
        }
    }
}

constexpr Kernels PORTABLE = {Path::portable, quantize, linear};

}  // namespace

const Kernels* portable_kernels() { return &PORTABLE; }

}  // namespace septet

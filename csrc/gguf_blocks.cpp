// See gguf_blocks.h.
#include "gguf_blocks.h"

#include <string.h>

namespace septet {
namespace {

// The 16 values of IQ4_NL and IQ4_XS (ggml's kvalues_iq4nl).
constexpr int8_t IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

uint16_t u16(const uint8_t* p) {
  uint16_t v;
  memcpy(&v, p, 2);
  return v;
}

// 16 bytes: low nibbles are weights 0 .. 15, high nibbles 16 .. 31; plus a fifth bit from `fifth` (bit i = weight i).
void nibbles(const uint8_t* p, uint32_t fifth, uint8_t* code) {
  for (int i = 0; i < 16; i++) {
    code[i] = static_cast<uint8_t>((p[i] & 15) | ((fifth >> i & 1) << 4));
    code[16 + i] = static_cast<uint8_t>((p[i] >> 4) | ((fifth >> (16 + i) & 1) << 4));
  }
}

void read_legacy(Kind kind, const uint8_t* p, Cell& cell) {
  uint32_t fifth = 0;
  cell.d = u16(p);
  p += 2;
  if (kind == Kind::q4_1 || kind == Kind::q5_1) cell.m = u16(p), p += 2;
  if (kind == Kind::q5_0 || kind == Kind::q5_1) memcpy(&fifth, p, 4), p += 4;
  nibbles(p, fifth, cell.code);
}

// Q4_K and Q5_K: scale and minimum j (0 .. 7) of 12 packed bytes.
void scales_k4(const uint8_t* p, int j, Cell& cell) {
  cell.s[0] = j < 4 ? p[j] & 63 : static_cast<uint8_t>((p[j + 4] & 15) | (p[j - 4] >> 6 << 4));
  cell.mn[0] = j < 4 ? p[j + 4] & 63 : static_cast<uint8_t>((p[j + 4] >> 4) | (p[j] >> 6 << 4));
}

void read_k4(const uint8_t* p, int j, bool five, Cell& cell) {
  cell.d = u16(p), cell.m = u16(p + 2);
  scales_k4(p + 4, j, cell);
  const uint8_t* high = p + 16;
  const uint8_t* low = (five ? p + 48 : p + 16) + 32 * (j / 2);
  for (int i = 0; i < 32; i++) {
    const int fifth = five ? high[i] >> j & 1 : 0;
    cell.code[i] = static_cast<uint8_t>((low[i] >> 4 * (j % 2) & 15) | (fifth << 4));
  }
}

void read_q6_k(const uint8_t* p, int j, Cell& cell) {
  const int half = j / 4, part = j % 4;  // 128 weights each: 64 bytes of low nibbles, 32 bytes of top bits
  const uint8_t* low = p + 64 * half + 32 * (part % 2);
  const uint8_t* high = p + 128 + 32 * half;
  for (int i = 0; i < 32; i++)
    cell.code[i] = static_cast<uint8_t>((low[i] >> 4 * (part / 2) & 15) | ((high[i] >> 2 * part & 3) << 4));
  cell.s[0] = p[192 + 2 * j], cell.s[1] = p[192 + 2 * j + 1];
  cell.d = u16(p + 208);
}

// Q3_K as q6_k: codes -4 .. 3 less the offset -32, scales -32 .. 31.
void read_q3_k(const uint8_t* p, int j, Cell& cell) {
  const uint8_t* low = p + 32 + 32 * (j / 4);
  for (int i = 0; i < 32; i++) {
    const int code = (low[i] >> 2 * (j % 4) & 3) | (p[i] >> j & 1) << 2;
    cell.code[i] = static_cast<uint8_t>(code - 4 + 32);
  }
  const uint8_t* packed = p + 96;
  for (int h = 0; h < 2; h++) {
    const int n = 2 * j + h;  // of 16: low nibbles of bytes 0-7, then their high nibbles; top bits in bytes 8-11
    const int scale = (packed[n % 8] >> 4 * (n / 8) & 15) | (packed[8 + n % 4] >> 2 * (n / 4) & 3) << 4;
    cell.s[h] = static_cast<uint8_t>(scale - 32);
  }
  cell.d = u16(p + 108);
}

void read_q2_k(const uint8_t* p, int j, Cell& cell) {
  const uint8_t* low = p + 16 + 32 * (j / 4);
  for (int i = 0; i < 32; i++) cell.code[i] = static_cast<uint8_t>((low[i] >> 2 * (j % 4) & 3) + 32);
  for (int h = 0; h < 2; h++) cell.s[h] = p[2 * j + h] & 15, cell.mn[h] = p[2 * j + h] >> 4;
  cell.d = u16(p + 80), cell.m = u16(p + 82);
}

void through_iq4(Cell& cell) {
  for (uint8_t& code : cell.code) code = static_cast<uint8_t>(IQ4[code]);
}

void read_iq4_xs(const uint8_t* p, int j, Cell& cell) {
  nibbles(p + 8 + 16 * j, 0, cell.code);
  through_iq4(cell);
  const int scale = (p[4 + j / 2] >> 4 * (j % 2) & 15) | (u16(p + 2) >> 2 * j & 3) << 4;
  cell.wide = half_to_float(u16(p)) * static_cast<float>(scale - 32);
}

// Where the parts of block b of a group lie.
struct Parts {
  uint8_t *codes, *bits, *scales, *minima, *head;
};

Parts parts(Form form, uint8_t* group, int64_t b) {
  const Shape shape = shape_of(form);
  uint8_t* head = shape.head ? group + b / 8 * (8 * shape.block() + shape.head) : group;
  uint8_t* codes = shape.head ? head + shape.head + b % 8 * shape.block() : group + b * shape.block();
  uint8_t* bits = codes + shape.codes;
  return {codes, bits, bits + shape.bits, bits + shape.bits + shape.scales, head};
}

void put16(uint8_t* p, int r, uint16_t v) { memcpy(p + 2 * r, &v, 2); }
uint16_t get16(const uint8_t* p, int r) { return u16(p + 2 * r); }

}  // namespace

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff;
  uint32_t bits = sign | (exponent + 112) << 23 | mantissa << 13;
  if (exponent == 31) bits = sign | 0x7f800000 | mantissa << 13;
  float value;
  memcpy(&value, &bits, 4);
  if (exponent == 0) value = (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  return value;
}

void read_gguf(Kind kind, const uint8_t* row, int64_t b, Cell& cell) {
  const int j = static_cast<int>(b % 8);  // of the 8 blocks of 32 in 256
  switch (kind) {
    case Kind::q4_0: return read_legacy(kind, row + b * 18, cell);
    case Kind::q4_1: return read_legacy(kind, row + b * 20, cell);
    case Kind::q5_0: return read_legacy(kind, row + b * 22, cell);
    case Kind::q5_1: return read_legacy(kind, row + b * 24, cell);
    case Kind::q8_0:
      cell.d = u16(row + b * 34);
      memcpy(cell.code, row + b * 34 + 2, 32);
      return;
    case Kind::iq4_nl:
      read_legacy(Kind::q4_0, row + b * 18, cell);
      cell.wide = half_to_float(cell.d);
      return through_iq4(cell);
    case Kind::q2_k: return read_q2_k(row + b / 8 * 84, j, cell);
    case Kind::q3_k: return read_q3_k(row + b / 8 * 110, j, cell);
    case Kind::q4_k: return read_k4(row + b / 8 * 144, j, false, cell);
    case Kind::q5_k: return read_k4(row + b / 8 * 176, j, true, cell);
    case Kind::q6_k: return read_q6_k(row + b / 8 * 210, j, cell);
    case Kind::iq4_xs: return read_iq4_xs(row + b / 8 * 136, j, cell);
    case Kind::f32: case Kind::f16: case Kind::bf16: return;
  }
}

void store_cell(Form form, uint8_t* group, int64_t b, int r, const Cell& cell) {
  const Shape shape = shape_of(form);
  const Parts p = parts(form, group, b);
  for (int i = 0; i < 8; i++)
    for (int c = 0; c < 4; c++) {
      const int code = cell.code[4 * i + c];
      uint8_t* byte = p.codes + 64 * (shape.codes == 512 ? i : i % 4) + 4 * r + c;
      if (shape.codes == 512) *byte = static_cast<uint8_t>(code);
      else *byte = static_cast<uint8_t>(i < 4 ? code & 15 : *byte | (code & 15) << 4);
      if (shape.bits == 64) {
        uint8_t* bit = p.bits + 4 * r + c;
        *bit = static_cast<uint8_t>((i ? *bit : 0) | (code >> 4 & 1) << i);
      } else if (shape.bits == 128) {
        uint8_t* bit = p.bits + 64 * (i / 4) + 4 * r + c;
        *bit = static_cast<uint8_t>((i % 4 ? *bit : 0) | (code >> 4 & 3) << 2 * (i % 4));
      }
    }
  if (form == Form::q8_f) memcpy(p.scales + 4 * r, &cell.wide, 4);
  else if (!shape.head) put16(p.scales, r, cell.d);
  else if (shape.scales == 16) p.scales[r] = cell.s[0];
  else memcpy(p.scales + 2 * r, cell.s, 2);
  if (shape.head) put16(p.head, r, cell.d);
  if (shape.head == 64) put16(p.head + 32, r, cell.m);
  if (!shape.head && shape.minima) put16(p.minima, r, cell.m);
  else if (shape.minima == 16) p.minima[r] = cell.mn[0];
  else if (shape.minima == 32) memcpy(p.minima + 2 * r, cell.mn, 2);
}

void load_cell(Form form, const uint8_t* group, int64_t b, int r, Cell& cell) {
  const Shape shape = shape_of(form);
  const Parts p = parts(form, const_cast<uint8_t*>(group), b);
  for (int i = 0; i < 8; i++)
    for (int c = 0; c < 4; c++) {
      int code = p.codes[64 * (shape.codes == 512 ? i : i % 4) + 4 * r + c];
      if (shape.codes != 512) code = code >> (i < 4 ? 0 : 4) & 15;
      if (shape.bits == 64) code |= (p.bits[4 * r + c] >> i & 1) << 4;
      else if (shape.bits == 128) code |= (p.bits[64 * (i / 4) + 4 * r + c] >> 2 * (i % 4) & 3) << 4;
      cell.code[4 * i + c] = static_cast<uint8_t>(code);
    }
  if (form == Form::q8_f) memcpy(&cell.wide, p.scales + 4 * r, 4);
  else if (!shape.head) cell.d = get16(p.scales, r);
  else if (shape.scales == 16) cell.s[0] = p.scales[r];
  else memcpy(cell.s, p.scales + 2 * r, 2);
  if (shape.head) cell.d = get16(p.head, r);
  if (shape.head == 64) cell.m = get16(p.head + 32, r);
  if (!shape.head && shape.minima) cell.m = get16(p.minima, r);
  else if (shape.minima == 16) cell.mn[0] = p.minima[r];
  else if (shape.minima == 32) memcpy(cell.mn, p.minima + 2 * r, 2);
}

void cell_values(Form form, const Cell& cell, float* out) {
  const float d = form == Form::q8_f || form == Form::q4_w ? cell.wide : half_to_float(cell.d);
  const float m = shape_of(form).minima ? half_to_float(cell.m) : 0.0f;
  const int offset = form == Form::q4_0 || form == Form::q4_w ? 8 : form == Form::q5_0 ? 16 : form == Form::q6_k || form == Form::q2_k ? 32 : 0;
  for (int i = 0; i < 32; i++) {
    const int h = i / 16;
    const float code = static_cast<float>(cell.code[i] - offset);
    switch (form) {
      case Form::q8_0: case Form::q8_f: out[i] = d * static_cast<float>(static_cast<int8_t>(cell.code[i])); break;
      case Form::q4_1: case Form::q5_1: out[i] = code * d + m; break;
      case Form::q4_k: case Form::q5_k: out[i] = d * cell.s[0] * code - m * cell.mn[0]; break;
      case Form::q6_k: out[i] = d * static_cast<int8_t>(cell.s[h]) * code; break;
      case Form::q2_k: out[i] = d * static_cast<int8_t>(cell.s[h]) * code - m * cell.mn[h]; break;
      default: out[i] = d * code;
    }
  }
}

}  // namespace septet

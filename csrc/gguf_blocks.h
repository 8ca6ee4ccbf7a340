// One row's 32 weights between GGUF's blocks and our interleaved ones: codes and the numbers that scale them.
//
// Used by pack.cpp (GGUF -> Cell -> packed) and by dequantize_row and the portable kernels (packed -> Cell -> float).
// GGUF layouts by ggml's definitions (ggml-common.h, ggml-quants.c); tested bit for bit against the gguf package.
#pragma once

#include <stdint.h>

#include "pack.h"

namespace septet {

struct Cell {
  uint8_t code[32];    // codes as stored; int8 in forms with codes8
  uint16_t d, m;       // f16: scale and minimum of the block, or d and dmin of the head
  float wide;          // q8_f: the scale (q4_w: set by who reads a cell, from the group's tail)
  uint8_t s[2], mn[2]; // K forms: integer scales (int8 in q6_k, q2_k) and minima; [0] only where one covers the block
};

// Block `b` (32 weights) of a row in `kind` -> cell. The row is whole blocks.
void read_gguf(Kind kind, const uint8_t* row, int64_t b, Cell& cell);

// Cell <-> block `b` of row r (0 .. 15) of a packed group.
void store_cell(Form form, uint8_t* group, int64_t b, int r, const Cell& cell);
void load_cell(Form form, const uint8_t* group, int64_t b, int r, Cell& cell);

// The 32 weights as floats: GGUF's formula, in float32.
void cell_values(Form form, const Cell& cell, float* out);

}  // namespace septet

// See pack.h.
#include "pack.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "gguf_blocks.h"
#include "pool.h"

namespace septet {
namespace {

constexpr int64_t HUGE_PAGE = int64_t{2} << 20;
constexpr int64_t CHUNK = int64_t{64} << 20;
constexpr int64_t MAX_SIDE = int64_t{1} << 31;  // rows or inputs: products with any block size stay far below 2**63

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory that weights are cut from, end to end. Untouched pages cost nothing.
struct Chunk {
  uint8_t* map;   // as the system gave it
  int64_t mapped;
  uint8_t* base;  // aligned to huge pages
  int64_t size, used;
  std::atomic<int> holders;
};

#if defined(__linux__)
uint8_t* map_memory(int64_t bytes) {
  void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<uint8_t*>(p);
}
void unmap_memory(uint8_t* p, int64_t bytes) { munmap(p, static_cast<size_t>(bytes)); }
void want_huge_pages(uint8_t* p, int64_t bytes) { madvise(p, static_cast<size_t>(bytes), MADV_HUGEPAGE); }
#else
uint8_t* map_memory(int64_t bytes) { return static_cast<uint8_t*>(calloc(static_cast<size_t>(bytes), 1)); }
void unmap_memory(uint8_t* p, int64_t) { free(p); }
void want_huge_pages(uint8_t*, int64_t) {}
#endif

Chunk* chunk_create(int64_t bytes) {
  const int64_t size = round_up(bytes < CHUNK ? CHUNK : bytes, HUGE_PAGE), mapped = size + HUGE_PAGE;
  uint8_t* map = map_memory(mapped);
  if (!map) return nullptr;
  const int64_t skip = round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(map) % HUGE_PAGE), HUGE_PAGE) -
                       static_cast<int64_t>(reinterpret_cast<uintptr_t>(map) % HUGE_PAGE);
  Chunk* chunk = new (std::nothrow) Chunk{map, mapped, map + skip, size, 0, {1}};
  if (!chunk) unmap_memory(map, mapped);
  else want_huge_pages(chunk->base, chunk->size);
  return chunk;
}

void chunk_release(Chunk* chunk) {
  if (!chunk || chunk->holders.fetch_sub(1) != 1) return;
  unmap_memory(chunk->map, chunk->mapped);
  delete chunk;
}

bool form_of(int kind, Path path, Form& form) {
  switch (static_cast<Kind>(kind)) {
    case Kind::q4_0: form = path == Path::avx2 ? Form::q4_w : Form::q4_0; return true;
    case Kind::q4_1: form = Form::q4_1; return true;
    case Kind::q5_0: form = Form::q5_0; return true;
    case Kind::q5_1: form = Form::q5_1; return true;
    case Kind::q8_0: form = Form::q8_0; return true;
    case Kind::q4_k: form = Form::q4_k; return true;
    case Kind::q5_k: form = Form::q5_k; return true;
    case Kind::q3_k: case Kind::q6_k: form = Form::q6_k; return true;
    case Kind::q2_k: form = Form::q2_k; return true;
    case Kind::iq4_nl: case Kind::iq4_xs: form = Form::q8_f; return true;
    case Kind::bf16: form = Form::bf16; return true;
    case Kind::f16: form = Form::f16; return true;
    case Kind::f32: form = Form::f32; return true;
  }
  return false;
}

// A float16 as +-mantissa * 2**(shift - 24); special: infinity or NaN.
struct HalfParts {
  int mantissa, shift;
  bool negative, special;
};
HalfParts half_parts(const uint8_t* at) {
  uint16_t half;
  memcpy(&half, at, 2);
  const int exponent = half >> 10 & 31, rest = half & 1023;
  return {exponent ? rest | 1024 : rest, exponent ? exponent - 1 : 0, (half & 0x8000) != 0, exponent == 31};
}

// Rows 16g .. of the source into group g. The destination is zero.
void pack_dense(Form form, uint8_t* group, const uint8_t* rows, int64_t count, int64_t k, int64_t stride) {
  const int64_t width = form == Form::f32 ? 4 : 2, cells = form == Form::bf16 ? 2 : 1, line = GROUP * cells * width;
  for (int64_t r = 0; r < count; r++)
    for (int64_t i = 0; i < k; i++)
      memcpy(group + i / cells * line + (r * cells + i % cells) * width, rows + r * stride + i * width, static_cast<size_t>(width));
}

// q4_w: a group's f16 scales become whole numbers, if they all can; else they stay, and the tail is zero, as it was.
void whole_scales(uint8_t* group, int64_t blocks) {
  const int64_t block = shape_of(Form::q4_w).block();
  const auto scale = [&](int64_t b, int r) { return group + b * block + 256 + 2 * r; };
  int lowest[GROUP];  // bit of a row's scales, 2**-24 being bit 0
  for (int r = 0; r < GROUP; r++) {
    int low = 64, high = 0;
    for (int64_t b = 0; b < blocks; b++) {
      const HalfParts half = half_parts(scale(b, r));
      if (half.special) return;
      for (int bit = 0; bit < 11; bit++)
        if (half.mantissa >> bit & 1) low = std::min(low, half.shift + bit), high = std::max(high, half.shift + bit);
    }
    if (high - low >= 15) return;
    lowest[r] = low < 64 ? low : 0;
  }
  for (int r = 0; r < GROUP; r++) {
    for (int64_t b = 0; b < blocks; b++) {
      const HalfParts half = half_parts(scale(b, r));
      const int up = half.shift - lowest[r], whole = up >= 0 ? half.mantissa << up : half.mantissa >> -up;
      const int16_t s = static_cast<int16_t>(half.negative ? -whole : whole);
      memcpy(scale(b, r), &s, 2);
    }
    const uint16_t unit = static_cast<uint16_t>((127 - 24 + lowest[r]) << 7);  // 2**(lowest - 24) as bfloat16
    memcpy(group + blocks * block + 2 * r, &unit, 2);
  }
}

// The scale of row r of q4_w, from the group's tail and what its block holds.
float whole_scale(const uint8_t* tail, int r, uint16_t stored) {
  uint16_t unit;
  memcpy(&unit, tail + 2 * r, 2);
  if (unit == 0) return half_to_float(stored);
  return ldexpf(static_cast<float>(static_cast<int16_t>(stored)), (unit >> 7) - 127);
}

void pack_group(Kind kind, Form form, uint8_t* group, const uint8_t* rows, int64_t count, int64_t k) {
  const int64_t stride = row_bytes(kind, k);
  if (form >= Form::bf16) return pack_dense(form, group, rows, count, k, stride);
  for (int64_t b = 0; b < k / BLOCK; b++)
    for (int64_t r = 0; r < count; r++) {
      Cell cell{};
      read_gguf(kind, rows + r * stride, b, cell);
      store_cell(form, group, b, static_cast<int>(r), cell);
    }
  if (form == Form::q4_w) whole_scales(group, k / BLOCK);
}

}  // namespace

class Arena {
 public:
  Chunk* chunk = nullptr;  // the one that takes the next weight; older ones belong to their weights
};

Arena* arena_create() { return new (std::nothrow) Arena; }

void arena_release(Arena* arena) {
  if (arena) chunk_release(arena->chunk);
  delete arena;
}

int64_t row_bytes(Kind kind, int64_t k) {
  int64_t elements = 32, size = 0;
  switch (kind) {
    case Kind::f32: elements = 1, size = 4; break;
    case Kind::f16: case Kind::bf16: elements = 1, size = 2; break;
    case Kind::q4_0: case Kind::iq4_nl: size = 18; break;
    case Kind::q4_1: size = 20; break;
    case Kind::q5_0: size = 22; break;
    case Kind::q5_1: size = 24; break;
    case Kind::q8_0: size = 34; break;
    case Kind::q2_k: elements = 256, size = 84; break;
    case Kind::q3_k: elements = 256, size = 110; break;
    case Kind::q4_k: elements = 256, size = 144; break;
    case Kind::q5_k: elements = 256, size = 176; break;
    case Kind::q6_k: elements = 256, size = 210; break;
    case Kind::iq4_xs: elements = 256, size = 136; break;
  }
  return k > 0 && k % elements == 0 ? k / elements * size : 0;
}

Packed* pack(Arena* arena, Pool* pool, const uint8_t* rows, int64_t n, int64_t k, int kind, Path path, const char** error) {
  Form form;
  const auto fail = [&](const char* why) { return *error = why, static_cast<Packed*>(nullptr); };
  if (!form_of(kind, path, form)) return fail("this block type is not implemented in the native library");
  if (n < 1 || n > MAX_SIDE || k > MAX_SIDE || row_bytes(static_cast<Kind>(kind), k) == 0) return fail("n or k does not fit the block type");
  const Kernels* run = kernels_for(path);
  if (!run) return fail("this CPU or this build has no such path");
  const int64_t count = (n + GROUP - 1) / GROUP, stride = group_bytes(form, k), bytes = count * stride;
  if (!arena->chunk || arena->chunk->size - arena->chunk->used < bytes) {
    Chunk* chunk = chunk_create(bytes);
    if (!chunk) return fail("out of memory");
    chunk_release(arena->chunk);
    arena->chunk = chunk;
  }
  Chunk* chunk = arena->chunk;
  uint8_t* data = chunk->base + chunk->used;
  Packed* packed = new (std::nothrow) Packed{n, k, form, count, stride, data, bytes, run, chunk};
  if (!packed) return fail("out of memory");
  chunk->used += round_up(bytes, 64);
  chunk->holders.fetch_add(1);
  const auto part = [&](int thread, int threads) {
    const Range mine = share(count, thread, threads);
    for (int64_t g = mine.first; g < mine.last; g++) {
      const int64_t left = n - g * GROUP;
      pack_group(static_cast<Kind>(kind), form, data + g * stride, rows + g * GROUP * row_bytes(static_cast<Kind>(kind), k), left < GROUP ? left : GROUP, k);
    }
  };
  if (pool) pool->parallel([&](int thread) { part(thread, pool->active()); });
  else part(0, 1);
  return packed;
}

void packed_release(Packed* packed) {
  if (packed) chunk_release(static_cast<Chunk*>(packed->owner));
  delete packed;
}

void dequantize_row(const Packed& w, int64_t row, float* out) {
  const uint8_t* group = w.data + row / GROUP * w.group_bytes;
  const int r = static_cast<int>(row % GROUP);
  if (!is_dense(w)) {
    Cell cell;
    for (int64_t b = 0; b < w.k / BLOCK; b++) {
      load_cell(w.form, group, b, r, cell);
      if (w.form == Form::q4_w) cell.wide = whole_scale(group + w.group_bytes - TAIL, r, cell.d);
      cell_values(w.form, cell, out + b * BLOCK);
    }
    return;
  }
  for (int64_t i = 0; i < w.k; i++) {
    uint16_t half;
    uint32_t bits;
    if (w.form == Form::f32) {
      memcpy(out + i, group + i * 64 + r * 4, 4);
    } else if (w.form == Form::f16) {
      memcpy(&half, group + i * 32 + r * 2, 2);
      out[i] = half_to_float(half);
    } else {
      memcpy(&half, group + i / 2 * 64 + r * 4 + i % 2 * 2, 2);
      bits = static_cast<uint32_t>(half) << 16;
      memcpy(out + i, &bits, 4);
    }
  }
}

}  // namespace septet

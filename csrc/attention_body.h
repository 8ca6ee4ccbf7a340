// Attention over slots of one token each. Included once per path, after lanes.h; see step_kernels.h.
//
// One token (decode): keys and values of up to a part's positions, dot products and weighted sums for all query heads of
// the kv head together, so that each key is read once. Many tokens (prompts): tiles of TILE_KEYS positions, both
// products by one register-blocked kernel, softmax kept up to date per query (arXiv 2205.14135).
#pragma once

#include "elementwise_body.h"
#include "lanes.h"
#include "step_kernels.h"

namespace septet {
namespace {

constexpr float NOTHING = -INFINITY;

inline int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }

// Slot `slot` of keys or values as floats: dim of them, zeros up to padded(dim).
inline void fetch(const void* base, Store kind, int64_t at, int64_t dim, float* out) {
  int64_t i = 0;
  if (kind == Store::f16) {
    const uint16_t* p = static_cast<const uint16_t*>(base) + at;
    for (; i + LANES <= dim; i += LANES) store(out + i, load_half(p + i));
    for (; i < dim; i++) out[i] = half_float(p[i]);
  } else if (kind == Store::bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(base) + at;
    for (; i + LANES <= dim; i += LANES) store(out + i, load_bf16(p + i));
    for (; i < dim; i++) out[i] = float_of_bf16(p[i]);
  } else {
    const float* p = static_cast<const float*>(base) + at;
    for (; i + LANES <= dim; i += LANES) store(out + i, load(p + i));
    for (; i < dim; i++) out[i] = p[i];
  }
  for (const int64_t end = padded(dim); i < end; i++) out[i] = 0.0f;
}

// H dot products of queries q (stride ld) with the 4 keys at k (stride ld) -> s[h * ld_s + 0 .. 3].
template <int H>
inline void dots(const float* q, const float* k, int64_t ld, float* s, int64_t ld_s) {
  F sum[H][4];
  for (int h = 0; h < H; h++)
    for (int p = 0; p < 4; p++) sum[h][p] = zero();
  for (int64_t i = 0; i < ld; i += LANES)
    for (int h = 0; h < H; h++) {
      const F a = load(q + h * ld + i);
      for (int p = 0; p < 4; p++) sum[h][p] = fma(a, load(k + p * ld + i), sum[h][p]);
    }
  for (int h = 0; h < H; h++) totals(sum[h][0], sum[h][1], sum[h][2], sum[h][3], s + h * ld_s);
}

// out[h] (ld) = sum over n positions of w[h * ld_w + p] * v[p * ld].
template <int H>
inline void weighted(const float* w, int64_t ld_w, const float* v, int64_t ld, int64_t n, float* out, int64_t ld_out) {
  for (int64_t i = 0; i < ld; i += 4 * LANES) {
    const int wide = static_cast<int>(ld - i < 4 * LANES ? (ld - i) / LANES : 4);
    F sum[H][4];
    for (int h = 0; h < H; h++)
      for (int j = 0; j < 4; j++) sum[h][j] = zero();
    if (wide == 4) {
      for (int64_t p = 0; p < n; p++)
        for (int h = 0; h < H; h++) {
          const F a = spread(w[h * ld_w + p]);
          for (int j = 0; j < 4; j++) sum[h][j] = fma(a, load(v + p * ld + i + j * LANES), sum[h][j]);
        }
    } else {
      for (int64_t p = 0; p < n; p++)
        for (int h = 0; h < H; h++) {
          const F a = spread(w[h * ld_w + p]);
          for (int j = 0; j < wide; j++) sum[h][j] = fma(a, load(v + p * ld + i + j * LANES), sum[h][j]);
        }
    }
    for (int h = 0; h < H; h++)
      for (int j = 0; j < wide; j++) store(out + h * ld_out + i + j * LANES, sum[h][j]);
  }
}

constexpr int64_t ONE_KEYS = 64;  // positions converted at a time
constexpr int64_t AHEAD = 12;     // positions that are asked for before they are read: slots lie anywhere

inline void ask_for(const void* base, Store kind, int64_t at, int64_t dim) {
  const int64_t size = kind == Store::f32 ? 4 : 2;
  const char* p = static_cast<const char*>(base) + at * size;
  for (int64_t i = 0; i < dim * size; i += 64) __builtin_prefetch(p + i);
}

int64_t scratch_one(const AttendShape& shape) {
  const int64_t ld = padded(shape.dim);
  return 4 * (2 * shape.heads * ld + ONE_KEYS * ld + shape.heads * 256);
}

// Scores of positions first .. last - 1 -> s (heads, n), scaled and capped.
void score_one(const AttendShape& shape, const AttendOne& task, const float* q, float* keys, float* s, int64_t n) {
  const int64_t ld = padded(shape.dim);
  for (int64_t base = 0; base < n; base += ONE_KEYS) {
    const int64_t count = n - base < ONE_KEYS ? n - base : ONE_KEYS;
    const int32_t* slots = task.slots + task.first + base;
    for (int64_t p = 0; p < count; p++) {
      if (base + p + AHEAD < n) ask_for(task.kv.k, task.kv.store, slots[p + AHEAD] * task.kv.k_stride, shape.dim);
      ask_for(task.kv.v, task.kv.store, slots[p] * task.kv.v_stride, shape.dim);  // needed after the scores
      fetch(task.kv.k, task.kv.store, slots[p] * task.kv.k_stride, shape.dim, keys + p * ld);
    }
    for (int64_t p = 0; p < count; p += 4) {  // the last few read stale keys: their scores are not used
      int64_t h = 0;
      for (; h + 2 <= shape.heads; h += 2) dots<2>(q + h * ld, keys + p * ld, ld, s + h * 256 + base + p, 256);
      if (h < shape.heads) dots<1>(q + h * ld, keys + p * ld, ld, s + h * 256 + base + p, 256);
    }
  }
  for (int64_t h = 0; h < shape.heads; h++) {
    scale_row(s + h * 256, shape.scale, n);
    if (shape.cap != 0.0f) soft_cap(s + h * 256, shape.cap, n, s + h * 256);
  }
}

// Scores (n) become e^(score - max); the rest of the last vector becomes 0. -> max, sum
inline void soften(float* s, int64_t n, float* most, float* sum) {
  for (int64_t p = n; p % LANES; p++) s[p] = NOTHING;
  F top = spread(NOTHING);
  for (int64_t p = 0; p < n; p += LANES) top = larger(load(s + p), top);
  *most = largest(top);
  top = spread(*most);
  F all = zero();
  for (int64_t p = 0; p < n; p += LANES) {
    const F e = exponential(sub(load(s + p), top));
    store(s + p, e);
    all = add(all, e);
  }
  *sum = total(all);
}

// At most 256 positions.
void attend_one(const AttendShape& shape, const AttendOne& task, void* scratch) {
  const int64_t ld = padded(shape.dim), n = task.last - task.first;
  float* q = static_cast<float*>(scratch);
  float* acc = q + shape.heads * ld;
  float* rows = acc + shape.heads * ld;
  float* s = rows + ONE_KEYS * ld;
  for (int64_t h = 0; h < shape.heads; h++) fetch(task.q, Store::f32, h * shape.dim, shape.dim, q + h * ld);
  score_one(shape, task, q, rows, s, n);
  const int64_t ld_part = shape.dim + 2;
  for (int64_t h = 0; h < shape.heads; h++) {
    float* part = task.part + h * ld_part;
    soften(s + h * 256, n, part, part + 1);
    memset(part + 2, 0, static_cast<size_t>(shape.dim) * 4);
  }
  const bool straight = n <= ONE_KEYS && ld == shape.dim;  // one pass over the values: no sum of passes
  float* to = straight ? task.part + 2 : acc;
  const int64_t ld_to = straight ? ld_part : ld;
  for (int64_t base = 0; base < n; base += ONE_KEYS) {
    const int64_t count = n - base < ONE_KEYS ? n - base : ONE_KEYS;
    for (int64_t p = 0; p < count; p++)
      fetch(task.kv.v, task.kv.store, task.slots[task.first + base + p] * task.kv.v_stride, shape.dim, rows + p * ld);
    int64_t h = 0;
    for (; h + 2 <= shape.heads; h += 2) weighted<2>(s + h * 256 + base, 256, rows, ld, count, to + h * ld_to, ld_to);
    if (h < shape.heads) weighted<1>(s + h * 256 + base, 256, rows, ld, count, to + h * ld_to, ld_to);
    for (h = 0; h < shape.heads && !straight; h++) {
      float* part = task.part + h * ld_part + 2;
      add_rows(part, acc + h * ld, shape.dim, part);
    }
  }
}

void merge(const float* parts, int64_t count, int64_t stride, int64_t dim, float* out) {
  float most = NOTHING, sum = 0;
  bool poisoned = false;
  for (int64_t c = 0; c < count; c++) {
    most = parts[c * stride] > most ? parts[c * stride] : most;
    poisoned |= parts[c * stride + 1] != parts[c * stride + 1];
  }
  memset(out, 0, static_cast<size_t>(dim) * 4);
  for (int64_t c = 0; c < count; c++) {
    const float* part = parts + c * stride;
    const float weight = poisoned ? NAN : part[0] == most ? 1.0f : expf(part[0] - most);
    sum += weight * part[1];
    const F w = spread(weight);
    lanes_of(dim, [&](int64_t i, int m) { put(out + i, m, fma(w, get(part + 2 + i, m), get(out + i, m))); });
  }
  scale_row(out, 1.0f / sum, dim);
}

#if SEPTET_LANES == 16
constexpr int ROWS = 8, COLS = 2;  // of the register block: ROWS values by COLS vectors
#else
constexpr int ROWS = 6, COLS = 2;
#endif
constexpr int64_t WIDE = COLS * LANES;

// c (R, WIDE) (+)= a (R, depth) b (depth, WIDE). Element (r, k) of a: a[r * a_row + k * a_col].
template <int R>
inline void block(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, int64_t depth, float* c,
                  int64_t ldc, bool more) {
  F sum[R][COLS];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < COLS; j++) sum[r][j] = more ? load(c + r * ldc + j * LANES) : zero();
  for (int64_t k = 0; k < depth; k++) {
    F y[COLS];
    for (int j = 0; j < COLS; j++) y[j] = load(b + k * ldb + j * LANES);
    for (int r = 0; r < R; r++) {
      const F x = spread(a[r * a_row + k * a_col]);
      for (int j = 0; j < COLS; j++) sum[r][j] = fma(x, y[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < COLS; j++) store(c + r * ldc + j * LANES, sum[r][j]);
}

// The same for n rows and `width` columns, a multiple of WIDE. Each row is computed as if it were alone.
void product(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
             int64_t n, int64_t width, bool more) {
  for (int64_t j = 0; j < width; j += WIDE) {
    int64_t r = 0;
    for (; r + ROWS <= n; r += ROWS) block<ROWS>(a + r * a_row, a_row, a_col, b + j, ldb, depth, c + r * ldc + j, ldc, more);
    for (; r + 2 <= n; r += 2) block<2>(a + r * a_row, a_row, a_col, b + j, ldb, depth, c + r * ldc + j, ldc, more);
    if (r < n) block<1>(a + r * a_row, a_row, a_col, b + j, ldb, depth, c + r * ldc + j, ldc, more);
  }
}

inline int64_t whole(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

// Queries lie in columns: scores (TILE_KEYS, n), so that softmax runs down the lanes, without sums across them.
struct TileScratch {
  int64_t n, wide, ld;                 // queries; rounded up to WIDE; stride of keys, values and acc
  float *q, *scores, *rows, *acc;      // (E, wide), (TILE_KEYS, wide), (TILE_KEYS, ld), (n, ld)
  float *at, *most, *sum, *shrink;     // (wide): position less the tile's start; running softmax
};

int64_t scratch_tile(const AttendShape& shape, int64_t count) {
  const int64_t n = count * shape.heads, wide = whole(n), ld = whole(shape.dim);
  return 4 * (wide * (shape.dim + TILE_KEYS + 4) + (TILE_KEYS + n) * ld);
}

TileScratch cut_tile(const AttendShape& shape, int64_t n, void* memory) {
  TileScratch s;
  s.n = n, s.wide = whole(n), s.ld = whole(shape.dim);
  s.q = static_cast<float*>(memory);
  s.scores = s.q + s.wide * shape.dim;
  s.rows = s.scores + s.wide * TILE_KEYS;
  s.acc = s.rows + TILE_KEYS * s.ld;
  s.at = s.acc + n * s.ld;
  s.most = s.at + s.wide;
  s.sum = s.most + s.wide;
  s.shrink = s.sum + s.wide;
  return s;
}

void begin_tile(const AttendShape& shape, const AttendTile& task, const TileScratch& s) {
  for (int64_t i = 0; i < s.wide; i++) {
    const int64_t query = i < s.n ? i : s.n - 1;  // what pads the last vector is computed and not used
    const float* q = task.q + query / shape.heads * task.ld_q + query % shape.heads * shape.dim;
    for (int64_t e = 0; e < shape.dim; e++) s.q[e * s.wide + i] = q[e] * shape.scale;
    s.at[i] = static_cast<float>(query / shape.heads);
    s.most[i] = NOTHING, s.sum[i] = 0;
  }
  memset(s.acc, 0, static_cast<size_t>(s.n * s.ld) * 4);
}

// Slots of positions base .. base + TILE_KEYS - 1 up to `end` as floats; what lies beyond is zero.
void fetch_tile(const void* from, int64_t stride, const AttendShape& shape, const AttendTile& task, int64_t base, int64_t end,
                const TileScratch& s) {
  const int64_t count = end - base < TILE_KEYS ? end - base : TILE_KEYS;
  if (padded(shape.dim) < s.ld || count < TILE_KEYS) memset(s.rows, 0, static_cast<size_t>(TILE_KEYS * s.ld) * 4);
  const int32_t* slots = task.slots + base;
  for (int64_t p = 0; p < count; p++) {
    if (p + AHEAD < count) ask_for(from, task.kv.store, slots[p + AHEAD] * stride, shape.dim);
    fetch(from, task.kv.store, slots[p] * stride, shape.dim, s.rows + p * s.ld);
  }
}

// Scores of LANES queries from column i on: only keys k with low <= k <= high stay, per lane.
void mask_tile(const AttendShape& shape, const AttendTile& task, int64_t base, const TileScratch& s, int64_t i) {
  const F high = add(load(s.at + i), spread(static_cast<float>(task.start - base)));
  const F low = shape.window ? sub(high, spread(static_cast<float>(shape.window - 1))) : spread(0.0f);
  const F nothing = spread(NOTHING);
  for (int64_t k = 0; k < TILE_KEYS; k++) {
    const F key = spread(static_cast<float>(k));
    float* score = s.scores + k * s.wide + i;
    store(score, pick(less(high, key), nothing, pick(less(key, low), nothing, load(score))));
  }
}

// Softmax of the tile brought up to date for the queries from column `from` on; scores become weights.
void absorb(const AttendShape& shape, const AttendTile& task, int64_t base, const TileScratch& s, int64_t from) {
  const int64_t youngest = task.start + task.count - 1;
  const bool cut = base + TILE_KEYS - 1 > task.start || (shape.window && base < youngest - shape.window + 1);
  for (int64_t i = from; i < s.wide; i += LANES) {
    if (shape.cap != 0.0f)
      for (int64_t k = 0; k < TILE_KEYS; k++) soft_cap(s.scores + k * s.wide + i, shape.cap, LANES, s.scores + k * s.wide + i);
    if (cut) mask_tile(shape, task, base, s, i);
    const F before = load(s.most + i);
    F most = before;
    for (int64_t k = 0; k < TILE_KEYS; k++) most = larger(load(s.scores + k * s.wide + i), most);
    const F top = pick(at_least(most, spread(-3.0e38f)), most, zero());  // a query that has seen nothing yet
    const F shrink = exponential(sub(before, top));
    F sum = mul(load(s.sum + i), shrink);
    for (int64_t k = 0; k < TILE_KEYS; k++) {
      const F weight = exponential(sub(load(s.scores + k * s.wide + i), top));
      store(s.scores + k * s.wide + i, weight);
      sum = add(sum, weight);
    }
    store(s.most + i, most), store(s.sum + i, sum), store(s.shrink + i, shrink);
  }
  for (int64_t i = from; i < s.n; i++)
    if (s.shrink[i] != 1.0f) scale_row(s.acc + i * s.ld, s.shrink[i], s.ld);
}

void attend_tile(const AttendShape& shape, const AttendTile& task, void* memory) {
  const TileScratch s = cut_tile(shape, task.count * shape.heads, memory);
  const int64_t end = task.start + task.count;
  begin_tile(shape, task, s);
  const int64_t oldest = shape.window && task.start >= shape.window ? task.start - shape.window + 1 : 0;
  for (int64_t base = oldest / TILE_KEYS * TILE_KEYS; base < end; base += TILE_KEYS) {
    const int64_t skip = base > task.start ? base - task.start : 0;  // tokens before this tile see none of it
    const int64_t from = skip * shape.heads / WIDE * WIDE;
    fetch_tile(task.kv.k, task.kv.k_stride, shape, task, base, end, s);
    product(s.rows, s.ld, 1, s.q + from, s.wide, shape.dim, s.scores + from, s.wide, TILE_KEYS, s.wide - from, false);
    absorb(shape, task, base, s, from);
    fetch_tile(task.kv.v, task.kv.v_stride, shape, task, base, end, s);
    product(s.scores + from, 1, s.wide, s.rows, s.ld, TILE_KEYS, s.acc + from * s.ld, s.ld, s.n - from, s.ld, true);
  }
  for (int64_t i = 0; i < s.n; i++) {
    float* out = task.out + i / shape.heads * task.ld_out + i % shape.heads * shape.dim;
    memcpy(out, s.acc + i * s.ld, static_cast<size_t>(shape.dim) * 4);
    scale_row(out, 1.0f / s.sum[i], shape.dim);
  }
}

}  // namespace
}  // namespace septet

// Attention over slots of one token each. Included once per path, after lanes.h; see step_kernels.h.
//
// One order of addition, whoever asks: a query sees its context in tiles of TILE_KEYS positions that begin at multiples of
// TILE_KEYS. In a tile: scores by lanes along the head, softmax relative to the tile's own maximum, its sum by lanes along
// the positions, values added in order of positions. Tiles are joined in order into parts (part_of), parts in order into
// the result. A decoded token (attend_one: parts on different threads, then merge) and a token of a prompt (attend_tile)
// differ in which rows share a key's load, never in a row's own operations, so their results are the same bits.
#pragma once

#include "elementwise_body.h"
#include "lanes.h"
#include "step_kernels.h"

namespace septet {
namespace {

constexpr float NOTHING = -INFINITY;
constexpr int64_t AHEAD = 12;               // positions that are asked for before they are read: slots lie anywhere
constexpr int64_t LD_S = TILE_KEYS + 16;    // stride of scores: a group of four may end behind the tile
#if SEPTET_LANES == 16
constexpr int DOT_ROWS = 5, SUM_ROWS = 8, FEW_ROWS = 5;  // of register blocks: what 32 registers hold
#else
constexpr int DOT_ROWS = 3, SUM_ROWS = 6, FEW_ROWS = 3;
#endif

inline int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }

// LANES elements of a key or value from element i on.
template <Store S>
inline F element(const void* row, int64_t i) {
  if constexpr (S == Store::f16) return load_half(static_cast<const uint16_t*>(row) + i);
  if constexpr (S == Store::bf16) return load_bf16(static_cast<const uint16_t*>(row) + i);
  return load(static_cast<const float*>(row) + i);
}

inline const void* row_at(const void* base, Store kind, int64_t at) {
  return static_cast<const char*>(base) + at * (kind == Store::f32 ? 4 : 2);
}

// A key or value as floats: dim of them, zeros up to padded(dim).
inline void fetch(const void* row, Store kind, int64_t dim, float* out) {
  const uint16_t* halves = static_cast<const uint16_t*>(row);
  int64_t i = 0;
  for (; i + LANES <= dim; i += LANES)
    store(out + i, kind == Store::f16 ? element<Store::f16>(row, i) : kind == Store::bf16 ? element<Store::bf16>(row, i) : element<Store::f32>(row, i));
  for (; i < dim; i++)
    out[i] = kind == Store::f16 ? half_float(halves[i]) : kind == Store::bf16 ? float_of_bf16(halves[i]) : static_cast<const float*>(row)[i];
  for (const int64_t end = padded(dim); i < end; i++) out[i] = 0.0f;
}

inline void ask_for(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// The keys or values of a tile, by position, and what a group of query rows sees of it: positions low .. high - 1.
struct Tile {
  const void* row[TILE_KEYS];
  int64_t low, high;
};

// H dot products of queries q (stride ld) with 4 keys -> s[h * LD_S + 0 .. 3].
template <Store S, int H>
inline void dots(const float* q, int64_t ld, const void* const* keys, float* s) {
  F sum[H][4];
  for (int h = 0; h < H; h++)
    for (int p = 0; p < 4; p++) sum[h][p] = zero();
  for (int64_t i = 0; i < ld; i += LANES) {
    F a[H];
    for (int h = 0; h < H; h++) a[h] = load(q + h * ld + i);
    for (int p = 0; p < 4; p++) {
      const F key = element<S>(keys[p], i);
      for (int h = 0; h < H; h++) sum[h][p] = fma(a[h], key, sum[h][p]);
    }
  }
  for (int h = 0; h < H; h++) totals(sum[h][0], sum[h][1], sum[h][2], sum[h][3], s + h * LD_S);
}

template <Store S, int H>
inline void scores(const float* q, int64_t ld, const Tile& keys, float* s) {
  int64_t p = keys.low;
  for (; p + 4 <= keys.high; p += 4) dots<S, H>(q, ld, keys.row + p, s + p);
  if (p == keys.high) return;
  const void* last[4];
  for (int i = 0; i < 4; i++) last[i] = keys.row[p + i < keys.high ? p + i : keys.high - 1];
  dots<S, H>(q, ld, last, s + p);
}

// out[h] (ld) = sum over the tile's positions of w[h * LD_S + p] * value[p], C vectors at a time.
template <Store S, int H, int C>
inline void weighted(const float* w, const Tile& values, int64_t i, float* out, int64_t ld) {
  F sum[H][C];
  for (int h = 0; h < H; h++)
    for (int j = 0; j < C; j++) sum[h][j] = zero();
  for (int64_t p = values.low; p < values.high; p++) {
    F v[C];
    for (int j = 0; j < C; j++) v[j] = element<S>(values.row[p], i + j * LANES);
    for (int h = 0; h < H; h++) {
      const F a = spread(w[h * LD_S + p]);
      for (int j = 0; j < C; j++) sum[h][j] = fma(a, v[j], sum[h][j]);
    }
  }
  for (int h = 0; h < H; h++)
    for (int j = 0; j < C; j++) store(out + h * ld + i + j * LANES, sum[h][j]);
}
template <Store S, int H, int C>
inline void sums(const float* w, const Tile& values, float* out, int64_t ld) {
  int64_t i = 0;
  for (; i + C * LANES <= ld; i += C * LANES) weighted<S, H, C>(w, values, i, out, ld);
  for (; i < ld; i += LANES) weighted<S, H, 1>(w, values, i, out, ld);
}

// A row's scores of what it sees of the tile, low .. high - 1 of from .. to, become e^(score - max), the rest 0.
inline void soften(const AttendShape& shape, float* s, int64_t from, int64_t to, int64_t low, int64_t high, float* most, float* sum) {
  from = from / LANES * LANES, to = (to + LANES - 1) / LANES * LANES;
  if (shape.cap != 0.0f) soft_cap(s + low, shape.cap, high - low, s + low);
  for (int64_t p = from; p < low; p++) s[p] = NOTHING;
  for (int64_t p = high; p < to; p++) s[p] = NOTHING;
  F top = spread(NOTHING);
  for (int64_t p = from; p < to; p += LANES) top = larger(load(s + p), top);
  *most = largest(top);
  top = spread(*most);
  F all = zero();
  for (int64_t p = from; p < to; p += LANES) {
    const F e = exponential(sub(load(s + p), top));
    store(s + p, e);
    all = add(all, e);
  }
  *sum = total(all);
}

// What a row has seen: the largest score, the sum of e^(score - most), and of these times the values.
struct Seen {
  float most, sum;
};

// `seen` and `acc` (dim), then `next` and `more` (dim) of later positions -> both, in `seen` and `acc`.
inline void join(Seen& seen, float* acc, const Seen& next, const float* more, int64_t dim) {
  const bool higher = seen.most < next.most;
  float weights[LANES];
  store(weights, exponential(spread(higher ? seen.most - next.most : next.most - seen.most)));
  const F w = spread(weights[0]);
  float both[LANES];
  store(both, higher ? fma(w, spread(seen.sum), spread(next.sum)) : fma(w, spread(next.sum), spread(seen.sum)));
  seen.sum = both[0];
  if (higher) {
    seen.most = next.most;
    lanes_of(dim, [&](int64_t i, int m) { put(acc + i, m, fma(w, get(acc + i, m), get(more + i, m))); });
  } else {
    lanes_of(dim, [&](int64_t i, int m) { put(acc + i, m, fma(w, get(more + i, m), get(acc + i, m))); });
  }
}

inline void load_queries(const AttendShape& shape, const float* q, float* out) {
  const int64_t ld = padded(shape.dim);
  for (int64_t h = 0; h < shape.heads; h++) {
    fetch(q + h * shape.dim, Store::f32, shape.dim, out + h * ld);
    scale_row(out + h * ld, shape.scale, shape.dim);
  }
}

// -- one token --------------------------------------------------------------------------------------------------------
// fn(h, count) with a constant count, over all heads in blocks as even as can be.
template <typename Fn>
inline void head_blocks(int64_t heads, const Fn& fn) {
  const int64_t blocks = (heads + FEW_ROWS - 1) / FEW_ROWS;
  for (int64_t b = 0, h = 0; b < blocks; b++) {
    const int64_t end = heads * (b + 1) / blocks;
    switch (end - h) {
      case 1: fn(h, std::integral_constant<int, 1>()); break;
      case 2: fn(h, std::integral_constant<int, 2>()); break;
      case 3: fn(h, std::integral_constant<int, 3>()); break;
      case 4: fn(h, std::integral_constant<int, 4>()); break;
      default: fn(h, std::integral_constant<int, 5>()); break;
    }
    h = end;
  }
}

int64_t scratch_one(const AttendShape& shape) {
  const int64_t ld = padded(shape.dim);
  return 4 * (2 * shape.heads * ld + TILE_KEYS * ld + shape.heads * (LD_S + 2));
}

// Keys or values of positions base + low .. base + high - 1: where they lie, or as floats in `rows` where a vector of the
// pool's would end behind the head.
inline Store find_rows(const AttendShape& shape, const HeadKV& kv, const void* base, int64_t stride, const int32_t* slots, Tile& tile, float* rows) {
  for (int64_t p = tile.low; p < tile.high; p++) tile.row[p] = row_at(base, kv.store, slots[p] * stride);
  if (shape.dim % LANES == 0) return kv.store;
  for (int64_t p = tile.low; p < tile.high; p++) {
    fetch(tile.row[p], kv.store, shape.dim, rows + p * padded(shape.dim));
    tile.row[p] = rows + p * padded(shape.dim);
  }
  return Store::f32;
}

// Calls fn with the pool's type as a constant.
template <typename Fn>
inline void of_store(Store store, const Fn& fn) {
  if (store == Store::f16) fn(std::integral_constant<Store, Store::f16>());
  else if (store == Store::bf16) fn(std::integral_constant<Store, Store::bf16>());
  else fn(std::integral_constant<Store, Store::f32>());
}

void attend_one(const AttendShape& shape, const AttendOne& task, void* scratch) {
  const HeadKV& kv = task.kv;
  const int64_t heads = shape.heads, ld = padded(shape.dim), bytes = shape.dim * (kv.store == Store::f32 ? 4 : 2);
  float* q = static_cast<float*>(scratch);
  float* out = q + heads * ld;
  float* rows = out + heads * ld;
  float* s = rows + TILE_KEYS * ld;
  Seen* seen = reinterpret_cast<Seen*>(s + heads * LD_S);
  load_queries(shape, task.q, q);
  for (int64_t base = task.first / TILE_KEYS * TILE_KEYS; base < task.last; base += TILE_KEYS) {
    const int32_t* slots = task.slots + base;
    Tile tile;
    tile.low = task.first > base ? task.first - base : 0;
    tile.high = task.last - base < TILE_KEYS ? task.last - base : TILE_KEYS;
    const Store keys = find_rows(shape, kv, kv.k, kv.k_stride, slots, tile, rows);
    for (int64_t p = tile.low; p < tile.high; p++) ask_for(row_at(kv.v, kv.store, slots[p] * kv.v_stride), bytes);
    of_store(keys, [&](auto type) {
      head_blocks(heads, [&](int64_t h, auto n) { scores<decltype(type)::value, decltype(n)::value>(q + h * ld, ld, tile, s + h * LD_S); });
    });
    for (int64_t h = 0; h < heads; h++) soften(shape, s + h * LD_S, tile.low, tile.high, tile.low, tile.high, &seen[h].most, &seen[h].sum);
    const Store values = find_rows(shape, kv, kv.v, kv.v_stride, slots, tile, rows);
    of_store(values, [&](auto type) {
      head_blocks(heads, [&](int64_t h, auto n) { sums<decltype(type)::value, decltype(n)::value, 4>(s + h * LD_S, tile, out + h * ld, ld); });
    });
    for (int64_t h = 0; h < heads; h++) {
      float* part = task.part + h * (shape.dim + 2);
      Seen all{part[0], part[1]};
      if (base > task.first) {
        join(all, part + 2, seen[h], out + h * ld, shape.dim);
      } else {  // the part begins here
        all = seen[h];
        memcpy(part + 2, out + h * ld, static_cast<size_t>(shape.dim) * 4);
      }
      part[0] = all.most, part[1] = all.sum;
    }
  }
}

void merge(const float* parts, int64_t count, int64_t stride, int64_t dim, float* out) {
  Seen seen{parts[0], parts[1]};
  memcpy(out, parts + 2, static_cast<size_t>(dim) * 4);
  for (int64_t c = 1; c < count; c++) {
    const float* part = parts + c * stride;
    join(seen, out, {part[0], part[1]}, part + 2, dim);
  }
  scale_row(out, 1.0f / seen.sum, dim);
}

// -- many tokens ------------------------------------------------------------------------------------------------------
// Rows of a query tile: token * heads + head. What one tile of keys gives, the part under way, and all parts before it.
struct TileScratch {
  int64_t n, ld;
  float *q, *scores, *rows;       // (n, ld), (n, LD_S), (TILE_KEYS, ld)
  float *tile, *part, *all;       // (n, ld) each
  Seen *tile_seen, *part_seen, *all_seen;
};

int64_t scratch_tile(const AttendShape& shape, int64_t count) {
  const int64_t n = count * shape.heads, ld = padded(shape.dim);
  return 4 * (n * (4 * ld + LD_S + 6) + TILE_KEYS * ld);
}

TileScratch cut_tile(const AttendShape& shape, int64_t n, void* memory) {
  TileScratch s;
  s.n = n, s.ld = padded(shape.dim);
  s.q = static_cast<float*>(memory);
  s.scores = s.q + n * s.ld;
  s.rows = s.scores + n * LD_S;
  s.tile = s.rows + TILE_KEYS * s.ld;
  s.part = s.tile + n * s.ld;
  s.all = s.part + n * s.ld;
  s.tile_seen = reinterpret_cast<Seen*>(s.all + n * s.ld);
  s.part_seen = s.tile_seen + n;
  s.all_seen = s.part_seen + n;
  return s;
}

// Slots of positions base .. base + count - 1 as floats.
void fetch_tile(const void* from, int64_t stride, const AttendShape& shape, const AttendTile& task, int64_t base, int64_t count, const TileScratch& s) {
  const int32_t* slots = task.slots + base;
  const int64_t bytes = shape.dim * (task.kv.store == Store::f32 ? 4 : 2);
  for (int64_t p = 0; p < count; p++) {
    if (p + AHEAD < count) ask_for(row_at(from, task.kv.store, slots[p + AHEAD] * stride), bytes);
    fetch(row_at(from, task.kv.store, slots[p] * stride), task.kv.store, shape.dim, s.rows + p * s.ld);
  }
}

// What the token at `position` sees of the tile from base on.
struct View {
  int64_t low, high;
};
inline View view(const AttendShape& shape, int64_t position, int64_t base) {
  const int64_t oldest = shape.window && position >= shape.window ? position - shape.window + 1 : 0;
  return {oldest > base ? oldest - base : 0, position - base + 1 < TILE_KEYS ? position - base + 1 : TILE_KEYS};
}

// What rows r .. r + count - 1 see of it at least one of.
inline void set_view(const AttendShape& shape, const AttendTile& task, int64_t base, int64_t r, int64_t count, Tile& tile) {
  tile.low = view(shape, task.start + r / shape.heads, base).low;
  tile.high = view(shape, task.start + (r + count - 1) / shape.heads, base).high;
}

template <int H>
void score_rows(const AttendShape& shape, const AttendTile& task, int64_t base, int64_t r, Tile& tile, const TileScratch& s) {
  set_view(shape, task, base, r, H, tile);
  scores<Store::f32, H>(s.q + r * s.ld, s.ld, tile, s.scores + r * LD_S);
}
template <int H>
void sum_rows(const AttendShape& shape, const AttendTile& task, int64_t base, int64_t r, Tile& tile, const TileScratch& s) {
  set_view(shape, task, base, r, H, tile);
  for (int64_t i = r; i < r + H; i++) {
    const View own = view(shape, task.start + i / shape.heads, base);
    soften(shape, s.scores + i * LD_S, tile.low, tile.high, own.low, own.high, &s.tile_seen[i].most, &s.tile_seen[i].sum);
  }
  sums<Store::f32, H, 2>(s.scores + r * LD_S, tile, s.tile + r * s.ld, s.ld);
}

// The tile's results of row r join its part's, a part's that ends those before it.
void take_in(const AttendShape& shape, const AttendTile& task, int64_t base, int64_t r, const TileScratch& s) {
  const int64_t position = task.start + r / shape.heads, at = r * s.ld, part = part_of(base);
  const int64_t oldest = shape.window && position >= shape.window ? position - shape.window + 1 : 0;
  const bool begins = base == part_start(part) || base <= oldest;
  const bool ends = base + TILE_KEYS == part_start(part + 1) || base + TILE_KEYS > position;
  const float* from = s.tile + at;
  Seen seen = s.tile_seen[r];
  if (!begins) {
    join(s.part_seen[r], s.part + at, seen, from, shape.dim);
    from = s.part + at, seen = s.part_seen[r];
  } else if (!ends) {
    memcpy(s.part + at, from, static_cast<size_t>(shape.dim) * 4);
    s.part_seen[r] = seen;
  }
  if (!ends) return;
  if (part == part_of(oldest)) {
    memcpy(s.all + at, from, static_cast<size_t>(shape.dim) * 4);
    s.all_seen[r] = seen;
  } else {
    join(s.all_seen[r], s.all + at, seen, from, shape.dim);
  }
}

void attend_tile(const AttendShape& shape, const AttendTile& task, void* memory) {
  const TileScratch s = cut_tile(shape, task.count * shape.heads, memory);
  const int64_t end = task.start + task.count;
  for (int64_t i = 0; i < task.count; i++) load_queries(shape, task.q + i * task.ld_q, s.q + i * shape.heads * s.ld);
  Tile tile;
  for (int64_t p = 0; p < TILE_KEYS; p++) tile.row[p] = s.rows + p * s.ld;
  const int64_t oldest = shape.window && task.start >= shape.window ? task.start - shape.window + 1 : 0;
  for (int64_t base = oldest / TILE_KEYS * TILE_KEYS; base < end; base += TILE_KEYS) {
    // Rows first .. last - 1 see some of this tile.
    const int64_t first = base > task.start ? (base - task.start) * shape.heads : 0, out_of_window = base + TILE_KEYS - 1 + shape.window;
    const int64_t last = shape.window && out_of_window < end ? (out_of_window - task.start) * shape.heads : s.n;
    const int64_t count = end - base < TILE_KEYS ? end - base : TILE_KEYS;
    fetch_tile(task.kv.k, task.kv.k_stride, shape, task, base, count, s);
    int64_t r = first;
    for (; r + DOT_ROWS <= last; r += DOT_ROWS) score_rows<DOT_ROWS>(shape, task, base, r, tile, s);
    for (; r < last; r++) score_rows<1>(shape, task, base, r, tile, s);
    fetch_tile(task.kv.v, task.kv.v_stride, shape, task, base, count, s);
    for (r = first; r + SUM_ROWS <= last; r += SUM_ROWS) sum_rows<SUM_ROWS>(shape, task, base, r, tile, s);
    for (; r + 2 <= last; r += 2) sum_rows<2>(shape, task, base, r, tile, s);
    for (; r < last; r++) sum_rows<1>(shape, task, base, r, tile, s);
    for (r = first; r < last; r++) take_in(shape, task, base, r, s);
  }
  for (int64_t i = 0; i < s.n; i++) {
    float* out = task.out + i / shape.heads * task.ld_out + i % shape.heads * shape.dim;
    memcpy(out, s.all + i * s.ld, static_cast<size_t>(shape.dim) * 4);
    scale_row(out, 1.0f / s.all_seen[i].sum, shape.dim);
  }
}

}  // namespace
}  // namespace septet

// See tape.h.
#include "tape.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace septet {
namespace {

constexpr int64_t HUGE_PAGE = 2 << 20;
constexpr int64_t GATED_GROUPS = 4;                         // groups of a gated product whose outputs stay in the cache

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

const StepKernels* step_kernels_for(Path path) {
  if (!cpu_has(path)) return nullptr;
#if defined(__x86_64__) && !defined(SEPTET_NO_AVX512)
  if (path == Path::avx512) return step_kernels_avx512();
#endif
#if defined(__x86_64__) && !defined(SEPTET_NO_AVX2)
  if (path == Path::avx2) return step_kernels_avx2();
#endif
  return step_kernels_portable();
}

bool Tape::Memory::fit(int64_t bytes) {
  if (bytes <= size) return true;
  free(at);
  at = nullptr, size = 0;
  const bool big = bytes >= HUGE_PAGE;
  const int64_t want = round_up(bytes, big ? HUGE_PAGE : 64);
  void* memory = nullptr;
  if (posix_memalign(&memory, big ? HUGE_PAGE : 64, static_cast<size_t>(want))) return false;
#if defined(__linux__)
  if (big) madvise(memory, static_cast<size_t>(want), MADV_HUGEPAGE);
#endif
  at = static_cast<char*>(memory), size = want;
  return true;
}
Tape::Memory::~Memory() { free(at); }

Tape::Tape(const Program& p, Pool& pool)
    : pool_(pool),
      kernels_(step_kernels_for(static_cast<Path>(p.path))),
      store_(static_cast<Store>(p.store)),
      registers_(p.registers, p.registers + p.n_registers),
      ops_(p.ops, p.ops + p.n_ops),
      products_(p.products, p.products + p.n_products),
      attentions_(p.attentions, p.attentions + p.n_attentions),
      phases_(p.phases, p.phases + p.n_phases),
      layers_(p.layers, p.layers + p.n_layers),
      matrix_(kernels_for(static_cast<Path>(p.path))),
      logits_phase_(p.logits_phase),
      own_width_{p.own_width[0], p.own_width[1]},
      shared_width_{p.shared_width[0], p.shared_width[1]},
      quant_width_(p.quant_width),
      result_width_(p.result_width),
      hidden_(p.hidden),
      private_(static_cast<size_t>(pool.size())),
      scratch_(static_cast<size_t>(pool.size())),
      next_(new std::atomic<int64_t>[static_cast<size_t>(p.n_phases)]) {
  for (const Attention& a : attentions_) {
    part_width_ = std::max<int64_t>(part_width_, a.heads * (a.dim + 2));
    const auto same = [&](const Plan& plan) { return plan.window == a.window && plan.heads == a.heads && plan.kv_heads == a.kv_heads; };
    if (std::none_of(plans_.begin(), plans_.end(), same)) plans_.push_back({a.window, a.heads, a.kv_heads, {}, {}, 1});
  }
}
Tape::~Tape() = default;

// -- before a step ----------------------------------------------------------------------------------------------------
int Tape::start(const Step& step, int parts) {
  if (parts & hidden) {
    for (const RowOp& op : ops_)
      if (op.op == Op::embed)
        for (int64_t t = 0; t < step.tokens; t++)
          if (step.ids[t] < 0 || step.ids[t] >= op.weight->n) return -2;
  }
  tokens_ = step.tokens, picks_ = parts & logits ? step.picks : 0;
  result_ = step.result;
  if (!prepare(step)) return -1;
  if (parts & hidden) {
    row_of_token_.resize(static_cast<size_t>(tokens_));
    for (int64_t r = 0; r < step.rows; r++)
      for (int64_t t = step.q_start[r]; t < step.q_start[r + 1]; t++) row_of_token_[t] = static_cast<int32_t>(r);
    decode_ = step.tokens == step.rows;
    for (Plan& plan : plans_) plan_rows(step, plan);
  }
  for (size_t i = 0; i < phases_.size(); i++) next_[i].store(0, std::memory_order_relaxed);
  return 0;
}

int Tape::run(const Step& step, int parts) {
  if (const int status = start(step, parts)) return status;
  const int64_t first = parts & hidden ? 0 : logits_phase_;
  const int64_t last = parts & logits ? static_cast<int64_t>(phases_.size()) : logits_phase_;
  pool_.parallel([&](int thread) { execute(step, first, last, thread); });
  return 0;
}

int Tape::decode(const Decode& rows) {
  ids_.resize(static_cast<size_t>(rows.n)), lengths_.resize(static_cast<size_t>(rows.n));
  for (int64_t i = static_cast<int64_t>(iota_.size()); i <= rows.n; i++)
    iota_.push_back(i), ends_.push_back(static_cast<int32_t>(i));
  for (int64_t i = 0; i < rows.n; i++) {
    const int64_t at = rows.row[i] * rows.stride + rows.start[i];
    ids_[i] = rows.tokens[at];
    rows.slot_of[at] = static_cast<int32_t>(rows.slots[i]);
    lengths_[i] = static_cast<int32_t>(rows.start[i] + 1);
  }
  const Step step{rows.n, rows.n, rows.n, ids_.data(), rows.start, rows.slots, rows.row, ends_.data(), lengths_.data(),
                  rows.slot_of, rows.stride, iota_.data(), rows.logits};
  if (const int status = start(step, both)) return status;
  choosing_.resize(static_cast<size_t>(pool_.size()));
  for (SamplingScratch& scratch : choosing_) scratch.fit(result_width_);
  pool_.parallel([&](int thread) {
    execute(step, 0, static_cast<int64_t>(phases_.size()), thread);
    if (!rows.sampled) return;
    pool_.barrier(thread);
    const Clock::time_point from = timed_ && thread == 0 ? Clock::now() : Clock::time_point();
    choose_tokens(rows, thread);
    if (timed_ && thread == 0) work_.back() += Clock::now() - from;
  });
  return 0;
}

void Tape::choose_tokens(const Decode& rows, int thread) {
  const Range mine = share(rows.n, thread, pool_.active());
  for (int64_t i = mine.first; i < mine.last; i++) choose_token(rows, i, thread);
}

void Tape::choose_token(const Decode& rows, int64_t i, int thread) {
  const int64_t r = rows.row[i], next = rows.start[i] + 1;
  float* logits = rows.logits + i * result_width_;
  if (rows.line && rows.line[i] >= 0) forbid(logits, result_width_, rows.words + rows.line[i] * rows.words_stride);
  const Sampling how{rows.temperature[r], rows.top_k[r], rows.top_p[r], rows.min_p[r], rows.seed[r], next};
  const int64_t token = choose(*kernels_, logits, result_width_, how, choosing_[thread]);
  rows.sampled[i] = token;
  rows.tokens[r * rows.stride + next] = static_cast<int32_t>(std::max<int64_t>(token, 0));
}

void Tape::draw_again(const Decode& rows) {
  std::vector<int64_t> masked;
  for (int64_t i = 0; i < rows.n; i++)
    if (rows.line[i] >= 0) masked.push_back(i);
  const int64_t n = static_cast<int64_t>(masked.size());
  const auto draw = [&](int thread, int threads) {
    const Range mine = share(n, thread, threads);
    for (int64_t k = mine.first; k < mine.last; k++) choose_token(rows, masked[static_cast<size_t>(k)], thread);
  };
  if (n <= ALONE) return draw(0, 1);
  pool_.parallel([&](int thread) { draw(thread, pool_.active()); });
}

const float* Tape::hidden_states() const { return row_of(hidden_, 0, 0); }

// Memory for this step's sizes.
bool Tape::prepare(const Step& step) {
  bool fits = true;
  const int64_t rows[2] = {tokens_, picks_};
  int64_t mine = 0;
  for (int d = 0; d < 2; d++) {
    if (rows[d] > FEW) fits &= own_[d].fit(own_width_[d] * rows[d] * 4);
    fits &= shared_[d].fit(std::max<int64_t>(shared_width_[d] * rows[d], 1) * 4);
    mine += round_up(own_width_[d] * FEW * 4, 64);
  }
  const int64_t most = std::max(rows[0], rows[1]);
  if (most > FEW) fits &= quant_.fit(quant_bytes(most, quant_width_));
  parts_at_.resize(static_cast<size_t>(step.rows));
  int64_t parts = 0;
  for (int64_t r = 0; r < step.rows; r++) {
    parts_at_[r] = parts;
    if (step.q_start[r + 1] - step.q_start[r] == 1) parts += part_of(step.kv_len[r] - 1) + 1;
  }
  fits &= parts_.fit(std::max<int64_t>(parts * part_width_, 1) * 4);
  const int64_t scratch = scratch_bytes();
  for (Memory& memory : private_) fits &= memory.fit(mine + quant_bytes(FEW, quant_width_));
  for (Memory& memory : scratch_) fits &= memory.fit(scratch);
  return fits;
}

int64_t Tape::scratch_bytes() const {
  int64_t most = 64;
  for (const Phase& phase : phases_)
    if (phase.work == Work::gated) {
      const int64_t groups = products_[phase.first_product].g1 - products_[phase.first_product].g0;
      const int64_t rows = std::max(tokens_, picks_);
      most = std::max(most, 2 * rows * GROUP * 4 * (rows <= FEW ? groups : std::min(groups, GATED_GROUPS)));
    }
  for (const Attention& a : attentions_) {
    const int64_t heads = a.heads / a.kv_heads;
    const AttendShape shape{a.dim, heads, a.scale, a.cap, a.window};
    const int64_t tile = kernels_->scratch_tile(shape, std::max<int64_t>(1, TILE_QUERIES / heads));
    most = std::max(most, round_up((heads + 1) * a.dim * 4, 64) + std::max(tile, kernels_->scratch_one(shape)));
  }
  return most;
}

// Decoding rows by parts of their context, prompts by tiles of their queries (the longest first).
void Tape::plan_rows(const Step& step, Plan& plan) const {
  plan.tasks.clear();
  plan.parts.assign(static_cast<size_t>(step.rows), 0);
  const int64_t per_tile = std::max<int64_t>(1, TILE_QUERIES / (plan.heads / plan.kv_heads));
  for (int32_t r = 0; r < step.rows; r++) {
    const int64_t count = step.q_start[r + 1] - step.q_start[r], length = step.kv_len[r];
    if (count == 1) {
      const int64_t oldest = plan.window && length > plan.window ? length - plan.window : 0;
      const int64_t first = part_of(oldest), last = part_of(length - 1);
      plan.parts[r] = static_cast<int32_t>(last - first + 1);
      for (int64_t part = first; part <= last; part++)
        for (int32_t head = 0; head < plan.kv_heads; head++)
          plan.tasks.push_back({r, head, static_cast<int32_t>(part - first), std::max(oldest, part_start(part)),
                                std::min(length, part_start(part + 1))});
    } else {
      for (int64_t end = length; end > length - count; end -= per_tile)
        for (int32_t head = 0; head < plan.kv_heads; head++)
          plan.tasks.push_back({r, head, -1, std::max(length - count, end - per_tile), end});
    }
  }
  plan.grab = std::max<int64_t>(1, static_cast<int64_t>(plan.tasks.size()) / (16 * pool_.size()));
}

const Tape::Plan& Tape::plan_of(const Attention& a) const {
  for (const Plan& plan : plans_)
    if (plan.window == a.window && plan.heads == a.heads && plan.kv_heads == a.kv_heads) return plan;
  return plans_.front();
}

// -- on each thread ---------------------------------------------------------------------------------------------------
float* Tape::row_of(int reg, int64_t row, int thread) const {
  const Register* r = &registers_[reg];
  const int64_t n = rows_in(r->domain);
  const bool scarce = n <= FEW;
  if (!scarce && r->merged >= 0) r = &registers_[r->merged];
  const int d = static_cast<int>(r->domain);
  float* base;
  if (r->zone == Zone::result) return result_ + row * result_width_;
  if (r->zone == Zone::shared) base = reinterpret_cast<float*>(shared_[d].at);
  else if (!scarce) base = reinterpret_cast<float*>(own_[d].at);
  else base = reinterpret_cast<float*>(private_[thread].at + (d ? round_up(own_width_[0] * FEW * 4, 64) : 0));
  return base + r->prefix * n + row * r->width;
}

void Tape::execute(const Step& step, int64_t first, int64_t last, int thread) {
  if (timed_ && thread == 0) return execute_timed(step, first, last);
  for (int64_t i = first; i < last; i++) {
    execute_phase(step, i, thread);
    if (i + 1 < last) pool_.barrier(thread);  // the end of the run is one
  }
}

void Tape::execute_timed(const Step& step, int64_t first, int64_t last) {
  Clock::time_point from = Clock::now();
  for (int64_t i = first; i < last; i++) {
    execute_phase(step, i, 0);
    const Clock::time_point done = Clock::now();
    if (i + 1 < last) pool_.barrier(0);
    const Clock::time_point met = Clock::now();
    work_[i] += done - from, wait_[i] += met - done, from = met;
  }
}

void Tape::times(double* work, double* wait) {
  const size_t n = phases_.size() + 1;
  for (size_t i = 0; timed_ && i < n; i++) {
    work[i] = std::chrono::duration<double>(work_[i]).count();
    wait[i] = std::chrono::duration<double>(wait_[i]).count();
  }
  timed_ = true;
  work_.assign(n, {}), wait_.assign(n, {});
}

void Tape::execute_phase(const Step& step, int64_t i, int thread) {
  const Phase& phase = phases_[i];
  if (phase.work == Work::attention) {
    attention(step, i, thread);
  } else if (phase.work == Work::none) {
    if (phase.op_count) {
      const Domain domain = registers_[ops_[phase.first_op].out].domain;
      row_operations(step, phase, share(rows_in(domain), thread, pool_.active()), thread);
    }
  } else {
    products(step, phase, thread);
  }
}

void Tape::row_operations(const Step& step, const Phase& phase, Range rows, int thread) {
  for (int64_t row = rows.first; row < rows.last; row++)
    for (int i = 0; i < phase.op_count; i++) row_operation(step, ops_[phase.first_op + i], row, thread);
}

void Tape::row_operation(const Step& step, const RowOp& op, int64_t row, int thread) {
  float* out = row_of(op.out, row, thread);
  if (op.op == Op::embed) {
    dequantize_row(*op.weight, step.ids[row], out);
    if (op.f0 != 1.0f) kernels_->scale(out, op.f0, op.weight->k);
    return;
  }
  const float* a = row_of(op.a, op.op == Op::take ? step.logits_at[row] : row, thread);
  switch (op.op) {
    case Op::norm: return kernels_->rms_norm(a, op.p0, op.f0, op.n, out);
    case Op::add_norm: {
      float* sum = row_of(op.out2, row, thread);
      kernels_->add(a, row_of(op.b, row, thread), op.n, sum);
      return kernels_->rms_norm(sum, op.p0, op.f0, op.n, out);
    }
    case Op::gated: return kernels_->gated(a, a + op.n, op.n, static_cast<Activation>(op.kind), out);
    case Op::cap: return kernels_->soft_cap(a, op.f0, op.n, out);
    case Op::merge: return merge_row(op, row, thread);
    case Op::take:
    case Op::copy: memcpy(out + op.column, a, static_cast<size_t>(op.n) * 4); return;
    case Op::embed: return;
  }
}

void Tape::merge_row(const RowOp& op, int64_t row, int thread) {
  const Attention& a = attentions_[op.kind];
  const int32_t r = row_of_token_[row], parts = plan_of(a).parts[r];
  const float* from = row_of(op.a, row, thread);
  float* out = row_of(op.out, row, thread);
  if (parts == 0) {
    if (out != from) memcpy(out, from, static_cast<size_t>(op.n) * 4);
    return;
  }
  const float* first = reinterpret_cast<const float*>(parts_.at) + parts_at_[r] * part_width_;
  for (int64_t h = 0; h < a.heads; h++) kernels_->merge(first + h * (a.dim + 2), parts, part_width_, a.dim, out + h * a.dim);
}

void Tape::products(const Step& step, const Phase& phase, int thread) {
  const Register& input = registers_[phase.input];
  const int64_t n = rows_in(input.domain);
  if (n == 0) return;
  const bool scarce = n <= FEW;
  const Range rows = scarce ? Range{0, n} : share(n, thread, pool_.active());
  row_operations(step, phase, rows, thread);
  const float* x = row_of(phase.input, 0, thread);
  QuantInput qx{};
  if (phase.quantise) {
    const int64_t at = round_up(own_width_[0] * FEW * 4, 64) + round_up(own_width_[1] * FEW * 4, 64);
    qx = quant_input(matrix_, scarce ? private_[thread].at + at : quant_.at, n, input.width_k);
    quantize_rows(x, input.width, input.width_k, rows.first, rows.last, qx);
  }
  if (!scarce && (phase.quantise || phase.op_count)) pool_.barrier(thread);
  if (phase.work == Work::gated) return gated(phase, qx, x, input.width, n, thread);
  const Register& output = registers_[phase.output];
  const int64_t ldy = output.zone == Zone::result ? result_width_ : output.width;
  float* y = row_of(phase.output, 0, thread);
  int64_t count = 0;  // groups of all products: threads share them as if they were one weight
  for (int i = 0; i < phase.product_count; i++) count += products_[phase.first_product + i].g1 - products_[phase.first_product + i].g0;
  Range mine = share(count, thread, pool_.active());
  for (int i = 0; i < phase.product_count; i++) {
    const Product& p = products_[phase.first_product + i];
    const int64_t here = p.g1 - p.g0, first = std::min(mine.first, here), last = std::min(mine.last, here);
    mine = {mine.first - first, mine.last - last};
    if (first == last) continue;
    float* to = y + p.column - p.g0 * GROUP;
    linear_part(*p.weight, qx, x, input.width, n, p.g0 + first, p.g0 + last, to, ldy, p.bias);
    if (phase.cap == 0.0f) continue;
    const int64_t c0 = (p.g0 + first) * GROUP, c1 = std::min((p.g0 + last) * GROUP, p.weight->n);
    for (int64_t row = 0; row < n; row++) kernels_->soft_cap(to + row * ldy + c0, phase.cap, c1 - c0, to + row * ldy + c0);
  }
}

// Two products, gate and up, of the same groups: their outputs meet in scratch, the activation goes to the output.
void Tape::gated(const Phase& phase, const QuantInput& qx, const float* x, int64_t ldx, int64_t n, int thread) {
  const Product& gate = products_[phase.first_product];
  const Product& up = products_[phase.first_product + 1];
  const Range mine = share(gate.g1 - gate.g0, thread, pool_.active());
  const int64_t step = n <= FEW ? mine.last - mine.first : GATED_GROUPS;
  float* scratch = reinterpret_cast<float*>(scratch_[thread].at);
  for (int64_t g = mine.first; g < mine.last; g += step) {
    const int64_t end = std::min(g + step, mine.last), width = (end - g) * GROUP;
    float* second = scratch + n * width;
    linear_part(*gate.weight, qx, x, ldx, n, gate.g0 + g, gate.g0 + end, scratch - (gate.g0 + g) * GROUP, width, gate.bias);
    linear_part(*up.weight, qx, x, ldx, n, up.g0 + g, up.g0 + end, second - (up.g0 + g) * GROUP, width, up.bias);
    for (int64_t row = 0; row < n; row++)
      kernels_->gated(scratch + row * width, second + row * width, width, static_cast<Activation>(phase.kind),
                      row_of(phase.output, row, thread) + g * GROUP);
  }
}

// -- attention --------------------------------------------------------------------------------------------------------
HeadKV Tape::head_of(const Attention& a, int64_t head) const {
  const LayerPool& pool = layers_[a.layer];
  const int64_t size = store_ == Store::f32 ? 4 : 2;
  return {static_cast<const char*>(pool.k) + head * pool.k_head * size, static_cast<const char*>(pool.v) + head * pool.v_head * size,
          pool.k_slot, pool.v_slot, store_};
}

// One token's key and value of one head, into the pool. scratch: E floats.
void Tape::write_token(const Step& step, const Attention& a, int64_t token, int64_t head, float* scratch) const {
  const float* row = row_of(a.qkv, token, 0);
  const float* key = row + (a.heads + head) * a.dim;
  const float* value = row + (a.heads + a.kv_heads + head) * a.dim;
  const HeadKV kv = head_of(a, head);
  const int64_t size = store_ == Store::f32 ? 4 : 2, slot = step.slots[token];
  kernels_->rotate(key, a.k_norm, a.eps, a.cos_sin + step.positions[token] * a.dim, a.dim, scratch);
  kernels_->to_pool(scratch, a.dim, store_, static_cast<char*>(const_cast<void*>(kv.k)) + slot * kv.k_stride * size);
  kernels_->to_pool(value, a.dim, store_, static_cast<char*>(const_cast<void*>(kv.v)) + slot * kv.v_stride * size);
}

// All heads of one token: keys and values to the pool, queries in place.
void Tape::rotate_token(const Step& step, const Attention& a, int64_t token, char* scratch) {
  float* row = row_of(a.qkv, token, 0);
  float* turned = reinterpret_cast<float*>(scratch);
  for (int64_t head = 0; head < a.kv_heads; head++) write_token(step, a, token, head, turned);
  for (int64_t head = 0; head < a.heads; head++) {
    kernels_->rotate(row + head * a.dim, a.q_norm, a.eps, a.cos_sin + step.positions[token] * a.dim, a.dim, turned);
    memcpy(row + head * a.dim, turned, static_cast<size_t>(a.dim) * 4);
  }
}

// Where all rows decode, each task rotates its own queries, and the part that ends with the new token stores it.
void Tape::attention(const Step& step, int64_t phase, int thread) {
  const Attention& a = attentions_[phases_[phase].attention];
  char* scratch = scratch_[thread].at;
  if (!decode_) {
    const Range mine = share(tokens_, thread, pool_.active());
    for (int64_t token = mine.first; token < mine.last; token++) rotate_token(step, a, token, scratch);
    pool_.barrier(thread);
  }
  const Plan& plan = plan_of(a);
  const int64_t count = static_cast<int64_t>(plan.tasks.size());
  for (;;) {
    const int64_t from = next_[phase].fetch_add(plan.grab, std::memory_order_relaxed);
    if (from >= count) return;
    for (int64_t i = from; i < std::min(from + plan.grab, count); i++) attend(step, a, plan.tasks[i], scratch);
  }
}

void Tape::attend(const Step& step, const Attention& a, const Task& task, char* scratch) {
  const int64_t heads = a.heads / a.kv_heads, length = step.kv_len[task.row];
  const AttendShape shape{a.dim, heads, a.scale, a.cap, a.window};
  const int32_t* slots = step.slot_of + step.row[task.row] * step.slot_stride;
  float* turned = reinterpret_cast<float*>(scratch);
  char* rest = scratch + round_up((heads + 1) * a.dim * 4, 64);
  const HeadKV kv = head_of(a, task.head);
  if (task.part < 0) {
    const int64_t token = step.q_start[task.row + 1] - (length - task.first);
    const AttendTile tile{kv, slots, task.first, task.last - task.first, row_of(a.qkv, token, 0) + task.head * heads * a.dim,
                          registers_[a.qkv].width, row_of(a.out, token, 0) + task.head * heads * a.dim, registers_[a.out].width};
    return kernels_->attend_tile(shape, tile, rest);
  }
  const int64_t token = step.q_start[task.row];
  const float* q = row_of(a.qkv, token, 0) + task.head * heads * a.dim;
  if (decode_) {
    if (task.last == length) write_token(step, a, token, task.head, turned);
    for (int64_t h = 0; h < heads; h++)
      kernels_->rotate(q + h * a.dim, a.q_norm, a.eps, a.cos_sin + step.positions[token] * a.dim, a.dim, turned + h * a.dim);
    q = turned;
  }
  float* part = reinterpret_cast<float*>(parts_.at) + (parts_at_[task.row] + task.part) * part_width_;
  const AttendOne one{kv, slots, task.first, task.last, q, part + task.head * heads * (a.dim + 2)};
  kernels_->attend_one(shape, one, rest);
}

}  // namespace septet

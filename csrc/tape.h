// The tape: a model's forward as a flat list of phases, executed by all threads of a pool in one call a step.
//
// Recorded and compiled in Python (septet/kernels/native/tape.py) from the model's own forward; this side knows no model.
// A phase is: row operations (each token by itself), then at most one of: matrix products of a row result, or attention.
// Its end is a barrier.
//
// Few rows (up to FEW): every thread computes the row operations of a phase for itself, in memory of its own, which is
// cheaper than a barrier. Many rows: threads share the rows, with a barrier before the products. What products and
// attention write lies in memory that all share.
#pragma once

#include <stdint.h>

#include <chrono>
#include <memory>
#include <vector>

#include "linear.h"
#include "pool.h"
#include "sampling.h"
#include "step_kernels.h"

namespace septet {

// Where a value lies: in its domain of n rows, row i is `width` floats from base of the zone + prefix * n + i * width.
enum class Zone : int32_t { own = 0, shared = 1, result = 2 };  // result: the caller's memory
enum class Domain : int32_t { tokens = 0, picks = 1 };          // T tokens of the step; S rows whose logits are wanted

// `merged` >= 0: the value is register `merged` itself where rows are many (see Op::merge).
struct Register {
  Zone zone;
  Domain domain;
  int32_t merged, reserved;
  int64_t prefix, width;  // width: stride of a row, a multiple of 16
  int64_t width_k;         // floats of a row that hold values
};

enum class Op : int32_t {
  embed = 0,     // out = row ids[t] of `weight` * f0
  norm = 1,      // out = rms_norm(a, p0, f0)
  add_norm = 2,  // out2 = a + b, out = rms_norm(out2, p0, f0)
  gated = 3,     // out (n) = act(a[: n]) * a[n :]; kind: Activation
  cap = 4,       // out = f0 * tanh(a / f0)
  take = 5,      // out = row logits_at[s] of a (tokens -> picks)
  copy = 6,      // out[column : column + n] = a
  merge = 7,     // out = a with the parts of split rows put together (after attention)
};

struct RowOp {
  Op op;
  int32_t kind, a, b, out, out2;
  int64_t column, n;
  float f0, reserved;
  const float* p0;
  const Packed* weight;
};

// Columns column .. column + rows - 1 of the phase's output = groups g0 .. g1 - 1 of `weight` times the input.
struct Product {
  const Packed* weight;
  const float* bias;  // (n of the weight) or null
  int64_t g0, g1, column;
};

struct Attention {
  int32_t qkv, out;  // registers: (T, (H + 2G) E) -> (T, H E)
  int32_t layer, heads, kv_heads, dim;
  float scale, cap, eps, reserved;
  int64_t window;
  const float* cos_sin;         // (positions, E)
  const float *q_norm, *k_norm; // (E) or null
};

enum class Work : int32_t { none = 0, products = 1, gated = 2, attention = 3 };

struct Phase {
  Work work;
  int32_t first_op, op_count;      // row operations
  int32_t first_product, product_count;
  int32_t input, output;           // registers of the products; gated: output has half the products' columns
  int32_t quantise;                // some product reads the input as int8
  int32_t attention;               // index
  int32_t kind;                    // gated: Activation
  float cap, reserved;             // products: soft cap of the outputs, 0 = none
};

struct LayerPool {
  void *k, *v;                 // element e of head g of slot s: k[s * k_slot + g * k_head + e]
  int64_t k_slot, v_slot, k_head, v_head;
};

struct Program {
  const Register* registers;
  const RowOp* ops;
  const Product* products;
  const Attention* attentions;
  const Phase* phases;
  const LayerPool* layers;
  int64_t n_registers, n_ops, n_products, n_attentions, n_phases, n_layers;
  int64_t logits_phase;        // phases before it compute hidden states; from it on, logits
  int64_t own_width[2], shared_width[2];  // floats a row of each zone, by domain
  int64_t quant_width;         // widest input that is quantised
  int64_t result_width;
  int32_t hidden;              // register of the final hidden states
  int32_t store;               // Store of the pool
  int32_t path, reserved;
};

// One step, as in kernels/ops.py: Layout.
struct Step {
  int64_t tokens, rows, picks;
  const int64_t *ids, *positions, *slots;  // (T)
  const int64_t* row;                      // (R) line of slot_of
  const int32_t *q_start, *kv_len;         // (R + 1), (R)
  const int32_t* slot_of;
  int64_t slot_stride;
  const int64_t* logits_at;                // (S)
  float* result;                           // (S, result_width)
};

// A step in which each of n rows computes one token: what the device remembers of the rows, and what to do (engine/rows.py).
// Line r of each table belongs to row r; the token at start goes in, the sampled one is written at start + 1.
struct Decode {
  int64_t n;
  const int64_t *row, *start, *slots;  // (n)
  int32_t *tokens, *slot_of;           // (rows, stride)
  int64_t stride;
  const float *temperature, *top_p, *min_p;  // (rows)
  const int64_t *top_k, *seed;               // (rows)
  float* logits;                             // (n, result_width)
  int64_t* sampled;                          // (n); null: logits only
  const uint32_t* words;                     // (masks, words_stride) tokens allowed, one bit each
  int64_t words_stride;
  const int64_t* line;                       // (n) which mask a row follows, -1 = none; null: nobody has one
};

class Tape {
 public:
  // Copies the program's arrays; what they point to (weights, tables, the KV pool) stays the caller's.
  Tape(const Program& program, Pool& pool);
  ~Tape();
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  enum Parts : int { hidden = 1, logits = 2, both = 3 };
  // Computes final hidden states, logits of `step.logits_at`, or both. `logits` alone reads the hidden states of the run
  // before it, whose number of tokens it must repeat. 0; -1: out of memory; -2: a token id outside the embedding.
  int run(const Step& step, int parts);

  int decode(const Decode& rows);  // status as run
  // After a `decode` of the same rows, whose logits are there: the tokens of those that have a mask once more, under it.
  // Forbidden logits become -inf, so once for each row.
  void draw_again(const Decode& rows);

  const float* hidden_states() const;  // (T, width) of the last run, until the next

  // Where thread 0's time goes, from the call on: for each phase, then for sampling, seconds of work and of waiting for the
  // others. Each call to `times` begins anew.
  void times(double* work, double* wait);

 private:
  using Clock = std::chrono::steady_clock;
  struct Task {
    int32_t row, head;    // head: of keys and values
    int32_t part;         // which part of the row's context, -1: a tile of its queries
    int64_t first, last;  // positions: of the part, or of the queries
  };
  // The attention tasks of a step for layers of one window and one shape of heads.
  struct Plan {
    int64_t window, heads, kv_heads;
    std::vector<Task> tasks;
    std::vector<int32_t> parts;  // (R) parts of each row, 0 = tiles
    int64_t grab;                // tasks a thread takes at a time
  };
  struct Memory {
    char* at = nullptr;
    int64_t size = 0;
    bool fit(int64_t bytes);  // contents are lost when it grows
    Memory() = default;
    Memory(Memory&& other) noexcept : at(other.at), size(other.size) { other.at = nullptr, other.size = 0; }
    ~Memory();
  };

  int start(const Step& step, int parts);
  void choose_tokens(const Decode& rows, int thread);
  void choose_token(const Decode& rows, int64_t i, int thread);
  bool prepare(const Step& step);
  void plan_rows(const Step& step, Plan& plan) const;
  int64_t scratch_bytes() const;
  const Plan& plan_of(const Attention& a) const;
  void execute(const Step& step, int64_t first, int64_t last, int thread);
  void execute_phase(const Step& step, int64_t i, int thread);
  void execute_timed(const Step& step, int64_t first, int64_t last);
  void row_operations(const Step& step, const Phase& phase, Range rows, int thread);
  void row_operation(const Step& step, const RowOp& op, int64_t row, int thread);
  void merge_row(const RowOp& op, int64_t row, int thread);
  void products(const Step& step, const Phase& phase, int thread);
  void gated(const Phase& phase, const QuantInput& qx, const float* x, int64_t ldx, int64_t n, int thread);
  void attention(const Step& step, int64_t phase, int thread);
  void rotate_token(const Step& step, const Attention& a, int64_t token, char* scratch);
  void write_token(const Step& step, const Attention& a, int64_t token, int64_t head, float* scratch) const;
  void attend(const Step& step, const Attention& a, const Task& task, char* scratch);
  HeadKV head_of(const Attention& a, int64_t head) const;
  float* row_of(int reg, int64_t row, int thread) const;
  int64_t rows_in(Domain domain) const { return domain == Domain::tokens ? tokens_ : picks_; }
  bool few(Domain domain) const { return rows_in(domain) <= FEW; }

  static constexpr int64_t FEW = 4;
  static constexpr int64_t ALONE = 2;  // rows that one thread draws while it would wake another

  Pool& pool_;
  const StepKernels* kernels_;
  Store store_;
  std::vector<Register> registers_;
  std::vector<RowOp> ops_;
  std::vector<Product> products_;
  std::vector<Attention> attentions_;
  std::vector<Phase> phases_;
  std::vector<LayerPool> layers_;
  const Kernels* matrix_;
  int64_t logits_phase_, own_width_[2], shared_width_[2], quant_width_, result_width_, part_width_ = 0;
  int32_t hidden_;

  int64_t tokens_ = 0, picks_ = 0;       // of this step
  bool decode_ = false;                  // one token a row
  float* result_ = nullptr;
  std::vector<Plan> plans_;
  std::vector<int32_t> row_of_token_;    // (T)
  std::vector<int64_t> parts_at_;        // (R) first part of each row, in parts
  std::vector<int64_t> ids_, iota_;      // of a decode
  std::vector<int32_t> ends_, lengths_;
  std::vector<SamplingScratch> choosing_;  // (threads)
  Memory own_[2], shared_[2], quant_, parts_;
  std::vector<Memory> private_, scratch_;  // (threads)
  std::unique_ptr<std::atomic<int64_t>[]> next_;  // (phases) next task to take
  bool timed_ = false;
  std::vector<Clock::duration> work_, wait_;  // (phases + 1)
};

}  // namespace septet

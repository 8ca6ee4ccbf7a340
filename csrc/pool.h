// The compute threads: the caller is thread 0, size() - 1 workers sleep until called.
//
// One owner (the engine's native handle) creates a Pool and runs one `parallel` at a time on it. Inside, the threads meet
// at `barrier` as often as they like: a flag per thread on its own cache line, a bounded spin, then yielding, so that too
// many threads for the CPUs are slow but never stuck. Between runs workers spin for about 50 us, then sleep.
//
// A busy neighbour: threads that meet at every barrier all wait for the one whose CPU is taken. The pool watches how long
// they do, leaves threads out where the rest is faster without them, and tries again later (Crew). Results never depend
// on the number of threads. Knows no kernels.
#pragma once

#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace septet {

// How many threads a run gets. With n of them, of which some stand still for `lost` of `spent` seconds, n - 1 would need
// (spent - lost) n / (n - 1): less where lost > spent / n.
class Crew {
 public:
  explicit Crew(int most) : most_(most), now_(most) {}
  int now() const { return now_; }
  void note(double spent, double lost);  // after each run

 private:
  int most_, now_;
  double spent_ = 0, lost_ = 0;  // of this window
  int runs_ = 0, hold_ = 0, patience_ = 4;  // windows to wait before one more thread is tried
  bool trial_ = false;
};

class Pool {
 public:
  // `threads` >= 1, the caller included. Workers are pinned, one CPU each, only where the threads fill this process's
  // affinity mask (with more CPUs than threads the kernel places them better than we can). The caller is not: between steps
  // it does other work, for which any free CPU will do.
  explicit Pool(int threads, bool pin = true);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }    // threads there are
  int active() const { return active_; }  // inside parallel: threads that take part, 1 .. size()

  // Runs fn(thread) for thread = 0 .. active() - 1 and returns when all are done. fn must not throw. Not re-entrant, one
  // caller at a time.
  template <typename F>
  void parallel(const F& fn) {
    run([](const void* context, int thread) { (*static_cast<const F*>(context))(thread); }, &fn);
  }

  // Inside parallel: every thread that takes part calls it the same number of times; all writes before it are seen after it.
  void barrier(int thread);

 private:
  struct alignas(64) Flag {
    std::atomic<uint32_t> value{0};
    std::atomic<int64_t> stood{0};    // ns in this run that the thread waited for another, spinning aside
    std::atomic<bool> asleep{false};
  };
  static constexpr uint64_t MOST_THREADS = 1024;
  using Job = void (*)(const void* context, int thread);

  void run(Job job, const void* context);
  void start(Job job, const void* context, int threads);
  void work(int thread);
  void wait_for(const std::atomic<uint32_t>& flag, uint32_t value, int thread);

  int size_;
  int active_;
  Crew crew_;
  int spins_;             // pauses before yielding; 0 with more threads than CPUs
  std::vector<int> cpus_; // CPU of each thread, empty = not pinned
  std::unique_ptr<Flag[]> arrived_;  // (size) barriers passed by each thread
  Flag released_;                    // barriers that all have passed, for many threads
  alignas(64) std::atomic<uint64_t> go_{0};  // runs started, times MOST_THREADS, plus the threads of the last
  Job job_ = nullptr;
  const void* context_ = nullptr;
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

// Part `i` of `parts` of 0 .. count - 1, as even as can be: [first, last).
struct Range {
  int64_t first, last;
};
inline Range share(int64_t count, int i, int parts) { return {count * i / parts, count * (i + 1) / parts}; }

}  // namespace septet

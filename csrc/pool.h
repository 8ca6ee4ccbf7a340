// The compute threads: the caller is thread 0, size() - 1 workers sleep until called.
//
// One owner (the engine's native handle) creates a Pool and runs one `parallel` at a time on it. Inside, the threads meet
// at `barrier` as often as they like: a flag per thread on its own cache line, a bounded spin, then yielding, so that too
// many threads for the CPUs are slow but never stuck. Between runs workers spin for about 50 us, then sleep.
// Knows no kernels.
#pragma once

#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace septet {

class Pool {
 public:
  // `threads` >= 1, the caller included. Workers are pinned, one CPU each, only where the threads fill this process's
  // affinity mask (with more CPUs than threads the kernel places them better than we can).
  explicit Pool(int threads, bool pin = true);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Runs fn(thread) on all threads, thread = 0 .. size() - 1, and returns when all are done. fn must not throw.
  // Not re-entrant, one caller at a time.
  template <typename F>
  void parallel(const F& fn) {
    run([](const void* context, int thread) { (*static_cast<const F*>(context))(thread); }, &fn);
  }

  // Inside parallel: every thread calls it the same number of times; all writes before it are seen after it.
  void barrier(int thread);

  // Pins the calling thread to the CPU kept for thread 0, where workers are pinned. For a thread that computes only.
  bool pin_caller();

 private:
  struct alignas(64) Flag {
    std::atomic<uint32_t> value{0};
  };
  using Job = void (*)(const void* context, int thread);

  void run(Job job, const void* context);
  void work(int thread);
  void wait_for(const std::atomic<uint32_t>& flag, uint32_t value) const;

  int size_;
  int spins_;             // pauses before yielding; 0 with more threads than CPUs
  std::vector<int> cpus_; // CPU of each thread, empty = not pinned
  std::unique_ptr<Flag[]> arrived_;  // (size) barriers passed by each thread
  Flag released_;                    // barriers that all have passed, for many threads
  Flag go_;                          // runs started
  Job job_ = nullptr;
  const void* context_ = nullptr;
  bool stop_ = false;
  std::atomic<int> sleeping_{0};
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

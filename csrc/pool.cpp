// See pool.h.
#include "pool.h"

#include <chrono>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace septet {
namespace {

constexpr int SPINS = 4096;         // pauses in a barrier before yielding: some 50 us
constexpr int YIELDS = 2000;        // yields before naps: the thread waited for does not get a CPU
constexpr int GATHER_THREADS = 5;   // from here on thread 0 gathers and releases; below, all look at all
constexpr auto AWAKE = std::chrono::microseconds(50);  // a worker without work

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// True once `value` is reached; counters wrap, so compare the difference.
inline bool reached(const std::atomic<uint32_t>& flag, uint32_t value) {
  return static_cast<int32_t>(flag.load(std::memory_order_acquire) - value) >= 0;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
#endif
  return cpus;
}

bool pin_self(int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return pthread_setaffinity_np(pthread_self(), sizeof set, &set) == 0;
#else
  (void)cpu;
  return false;
#endif
}

}  // namespace

Pool::Pool(int threads, bool pin) : size_(threads < 1 ? 1 : threads), arrived_(new Flag[size_]) {
  const std::vector<int> allowed = allowed_cpus();
  const int cpus = allowed.empty() ? static_cast<int>(std::thread::hardware_concurrency()) : static_cast<int>(allowed.size());
  spins_ = cpus > 0 && size_ > cpus ? 0 : SPINS;
  if (pin && static_cast<int>(allowed.size()) == size_) cpus_ = allowed;
  for (int thread = 1; thread < size_; thread++) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  stop_ = true;
  if (size_ > 1) run([](const void*, int) {}, nullptr);
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::pin_caller() { return !cpus_.empty() && pin_self(cpus_[0]); }

void Pool::run(Job job, const void* context) {
  if (size_ == 1) return job(context, 0);
  job_ = job;
  context_ = context;
  // seq_cst on go_ and sleeping_: either the worker sees the new go_ before it sleeps, or we see that it sleeps.
  go_.value.fetch_add(1, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  job(context, 0);
  barrier(0);
}

void Pool::work(int thread) {
  if (!cpus_.empty()) pin_self(cpus_[thread]);
  uint32_t seen = 0;
  for (bool last = false; !last;) {
    const auto until = std::chrono::steady_clock::now() + AWAKE;
    for (int i = 1; !reached(go_.value, seen + 1); i++) {
      relax();
      if (spins_ > 0 && (i % 64 || std::chrono::steady_clock::now() < until)) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return go_.value.load(std::memory_order_seq_cst) != seen; });
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
    seen++;
    last = stop_;
    job_(context_, thread);
    barrier(thread);
  }
}

void Pool::wait_for(const std::atomic<uint32_t>& flag, uint32_t value) const {
  for (int i = 0; i < spins_; i++) {
    if (reached(flag, value)) return;
    relax();
  }
  for (int i = 0; !reached(flag, value); i++) {
    if (i < YIELDS)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

void Pool::barrier(int thread) {
  if (size_ == 1) return;
  const uint32_t turn = arrived_[thread].value.load(std::memory_order_relaxed) + 1;
  arrived_[thread].value.store(turn, std::memory_order_release);
  if (size_ < GATHER_THREADS) {
    for (int other = 0; other < size_; other++)
      if (other != thread) wait_for(arrived_[other].value, turn);
  } else if (thread == 0) {
    for (int other = 1; other < size_; other++) wait_for(arrived_[other].value, turn);
    released_.value.store(turn, std::memory_order_release);
  } else {
    wait_for(released_.value, turn);
  }
}

}  // namespace septet

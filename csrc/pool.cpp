// See pool.h.
#include "pool.h"

#include <algorithm>
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
constexpr int WINDOW_RUNS = 8;      // runs, and
constexpr double WINDOW = 0.01, LONG_WINDOW = 0.3;  // seconds, after which the crew is judged
constexpr double MARGIN = 0.1;      // of a window that may be lost beyond a thread's worth
constexpr int MOST_PATIENCE = 64;
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

void Crew::note(double spent, double lost) {
  spent_ += spent, lost_ += lost, runs_++;
  if (spent_ < WINDOW || (runs_ < WINDOW_RUNS && spent_ < LONG_WINDOW)) return;
  const bool slow = now_ > 1 && lost_ > (1.0 / now_ + MARGIN) * spent_;
  spent_ = lost_ = 0, runs_ = 0;
  if (slow) {
    now_--;
    if (trial_) patience_ = std::min(2 * patience_, MOST_PATIENCE);
    hold_ = patience_, trial_ = false;
    return;
  }
  if (trial_) trial_ = false, patience_ = 4, hold_ = 1;
  if (now_ < most_ && --hold_ <= 0) now_++, trial_ = true;
}

Pool::Pool(int threads, bool pin)
    : size_(std::clamp(threads, 1, static_cast<int>(MOST_THREADS) - 1)), active_(size_), crew_(size_), arrived_(new Flag[size_]) {
  const std::vector<int> allowed = allowed_cpus();
  const int cpus = allowed.empty() ? static_cast<int>(std::thread::hardware_concurrency()) : static_cast<int>(allowed.size());
  spins_ = cpus > 0 && size_ > cpus ? 0 : SPINS;
  if (pin && static_cast<int>(allowed.size()) == size_) cpus_ = allowed;
  for (int thread = 1; thread < size_; thread++) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  stop_ = true;
  const auto nothing = [](const void*, int) {};
  if (size_ > 1) start(nothing, nullptr, size_);
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(Job job, const void* context) {
  if (size_ == 1) return job(context, 0);
  const auto began = std::chrono::steady_clock::now();
  start(job, context, crew_.now());
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - began;
  int64_t lost = 0;
  for (int thread = 0; thread < active_; thread++) lost = std::max(lost, arrived_[thread].stood.load(std::memory_order_relaxed));
  crew_.note(spent.count(), static_cast<double>(lost) * 1e-9);
}

void Pool::start(Job job, const void* context, int threads) {
  const uint32_t turn = arrived_[0].value.load(std::memory_order_relaxed);
  for (int thread = 0; thread < threads; thread++) {
    if (thread >= active_) arrived_[thread].value.store(turn, std::memory_order_relaxed);  // it was left out before
    arrived_[thread].stood.store(0, std::memory_order_relaxed);
  }
  job_ = job, context_ = context, active_ = threads;
  // seq_cst on go_ and asleep: either the worker sees the new go_ before it sleeps, or we see that it sleeps.
  const uint64_t runs = go_.load(std::memory_order_relaxed) / MOST_THREADS + 1;
  go_.store(runs * MOST_THREADS + static_cast<uint64_t>(threads), std::memory_order_seq_cst);
  bool asleep = false;
  for (int thread = 1; thread < threads; thread++) asleep |= arrived_[thread].asleep.load(std::memory_order_seq_cst);
  if (asleep) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  job(context, 0);
  barrier(0);
}

void Pool::work(int thread) {
  if (!cpus_.empty()) pin_self(cpus_[thread]);
  uint64_t seen = 0;
  // A new run that takes this thread: it can't end without it, so job_ and active_ stay that run's.
  const auto called = [&](std::memory_order order) {
    const uint64_t word = go_.load(order);
    if (word == seen || thread >= static_cast<int>(word % MOST_THREADS)) return false;
    seen = word;
    return true;
  };
  std::atomic<bool>& asleep = arrived_[thread].asleep;
  for (bool last = false; !last;) {
    const auto until = std::chrono::steady_clock::now() + AWAKE;
    for (int i = 1; !called(std::memory_order_acquire); i++) {
      relax();
      if (spins_ > 0 && (i % 64 || std::chrono::steady_clock::now() < until)) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      asleep.store(true, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return called(std::memory_order_seq_cst); });
      asleep.store(false, std::memory_order_seq_cst);
      break;
    }
    last = stop_;
    job_(context_, thread);
    barrier(thread);
  }
}

void Pool::wait_for(const std::atomic<uint32_t>& flag, uint32_t value, int thread) {
  for (int i = 0; i < spins_; i++) {
    if (reached(flag, value)) return;
    relax();
  }
  const auto began = std::chrono::steady_clock::now();
  for (int i = 0; !reached(flag, value); i++) {
    if (i < YIELDS)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  const std::chrono::nanoseconds stood = std::chrono::steady_clock::now() - began;
  arrived_[thread].stood.fetch_add(stood.count(), std::memory_order_relaxed);
}

void Pool::barrier(int thread) {
  const int threads = active_;
  if (threads == 1) return;
  const uint32_t turn = arrived_[thread].value.load(std::memory_order_relaxed) + 1;
  arrived_[thread].value.store(turn, std::memory_order_release);
  if (threads < GATHER_THREADS) {
    for (int other = 0; other < threads; other++)
      if (other != thread) wait_for(arrived_[other].value, turn, thread);
  } else if (thread == 0) {
    for (int other = 1; other < threads; other++) wait_for(arrived_[other].value, turn, thread);
    released_.value.store(turn, std::memory_order_release);
  } else {
    wait_for(released_.value, turn, thread);
  }
}

}  // namespace septet

// A pool of threads that lives as long as the process. One call at a time has it; others run on their own thread.

#pragma once
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace jaxrnn {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads wait for each other: for a moment by spinning, then by giving way.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    if (count_ == 1) return;
    unsigned round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < 4096) relax();
      else sched_yield();
    }
  }

 private:
  const int count_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> round_{0};
};

class Pool {
 public:
  // The processors that the process may use, or JAXRNN_NUM_THREADS if that is fewer; what is no number from 1 is told
  // and not obeyed.
  static int threads() {
    static const int count = [] {
      int available = std::thread::hardware_concurrency();
#if defined(__linux__)
      cpu_set_t set;
      if (sched_getaffinity(0, sizeof set, &set) == 0) available = CPU_COUNT(&set);
#endif
      if (available < 1) available = 1;
      const char* limit = std::getenv("JAXRNN_NUM_THREADS");
      if (limit == nullptr || *limit == '\0') return available;
      char* end = nullptr;
      const long wanted = std::strtol(limit, &end, 10);
      if (*end != '\0' || wanted < 1) {
        std::fprintf(stderr, "jaxrnn: JAXRNN_NUM_THREADS: expected a number from 1, got '%s'; using %d\n", limit,
                     available);
        return available;
      }
      return wanted < available ? static_cast<int>(wanted) : available;
    }();
    return count;
  }

  // part(k) for k = 0, ..., count − 1, each by a thread of its own, so that they may wait for each other; false, and
  // nothing done, while another call has the pool, and where the system gives no more threads.
  static bool run(int count, const std::function<void(int)>& part) { return get().start(count, part, false); }

  // The same of parts that never wait: what no thread has begun when the caller is through, the caller does too.
  static bool share(int count, const std::function<void(int)>& part) { return get().start(count, part, true); }

 private:
  // Never destroyed: threads may still wait in it when the process ends.
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  struct Worker {
    std::atomic<uint64_t> taken{0};  // the last job whose part somebody began
    bool take(uint64_t job) {
      uint64_t last = taken.load();
      return last < job && taken.compare_exchange_strong(last, job);
    }
  };

  bool start(int count, const std::function<void(int)>& part, bool all) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock() || process_ != getpid()) return false;
    while (static_cast<int>(workers_.size()) < count - 1)
      if (!hire()) return false;
    part_ = &part;
    left_.store(count - 1);
    caller_.store(processor());
    const uint64_t job = (job_.load() / MOST + 1) * MOST + count;
    job_.store(job);
    if (asleep_.load() != 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    part(0);
    for (int k = 1; all && k < count; ++k)
      if (workers_[k - 1]->take(job)) part(k), left_.fetch_sub(1);
    for (int spins = 0; left_.load() != 0; ++spins) {
      if (spins < 4096) relax();
      else sched_yield();
    }
    return true;
  }

  // One more worker with its thread, or neither.
  bool hire() {
    workers_.push_back(std::make_unique<Worker>());
    const int number = static_cast<int>(workers_.size());
    try {
      std::thread([this, number, worker = workers_.back().get(), seen = job_.load()] {
        loop(number, *worker, seen);
      }).detach();
    } catch (const std::system_error&) {
      workers_.pop_back();
      return false;
    }
    return true;
  }

  static int processor() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
  }

  // To another processor than this one. Two threads that do not sleep may else share one for long, and in turns of
  // milliseconds, while another one has nothing to do.
  static void leave(int taken) {
#if defined(__linux__)
    cpu_set_t all, others;
    if (taken < 0 || processor() != taken || sched_getaffinity(0, sizeof all, &all) != 0) return;
    others = all;
    CPU_CLR(taken, &others);
    if (CPU_COUNT(&others) != 0 && sched_setaffinity(0, sizeof others, &others) == 0)
      sched_setaffinity(0, sizeof all, &all);
#endif
  }

  // Whoever does not begin a part looks at nothing else of the job, since the next one may have come.
  void loop(int number, Worker& worker, uint64_t seen) {
    while (true) {
      uint64_t job = job_.load();
      const auto until = std::chrono::steady_clock::now() + AWAKE;
      while (job == seen && std::chrono::steady_clock::now() < until) {
        for (int spins = 0; spins < 64 && (job = job_.load()) == seen; ++spins) relax();
        leave(caller_.load());
      }
      if (job == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return (job = job_.load()) != seen; });
        asleep_.fetch_sub(1);
        lock.unlock();
        leave(caller_.load());
      }
      seen = job;
      if (number >= static_cast<int>(job % MOST) || !worker.take(job)) continue;
      (*part_)(number);
      left_.fetch_sub(1);
    }
  }

  static constexpr uint64_t MOST = 1 << 16;               // threads
  static constexpr std::chrono::milliseconds AWAKE{2};  // that a thread waits for the next job before it sleeps
  std::mutex owner_, mutex_;
  std::condition_variable wake_;
  std::vector<std::unique_ptr<Worker>> workers_;
  const std::function<void(int)>* part_ = nullptr;
  std::atomic<uint64_t> job_{0};  // its number, times MOST, and how many threads it takes
  std::atomic<int> left_{0}, asleep_{0}, caller_{-1};  // the last: a processor
  const pid_t process_ = getpid();  // a forked child has no workers
};

}  // namespace jaxrnn

// A pool of threads that lives as long as the process. One call at a time has it; others run on their own thread.

#pragma once
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <mutex>
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
  // The processors that the process may use, or JAXRNN_NUM_THREADS if that is fewer.
  static int threads() {
    static const int count = [] {
      int available = std::thread::hardware_concurrency();
#if defined(__linux__)
      cpu_set_t set;
      if (sched_getaffinity(0, sizeof set, &set) == 0) available = CPU_COUNT(&set);
#endif
      if (available < 1) available = 1;
      const char* limit = std::getenv("JAXRNN_NUM_THREADS");
      int wanted = limit ? std::atoi(limit) : available;
      return wanted < 1 ? 1 : wanted < available ? wanted : available;
    }();
    return count;
  }

  // work(k) for k = 0, ..., count − 1, all at once; false, and nothing done, while another call has the pool.
  static bool run(int count, const std::function<void(int)>& work) {
    Pool& pool = get();
    std::unique_lock<std::mutex> owner(pool.owner_, std::try_to_lock);
    if (!owner.owns_lock() || pool.process_ != getpid()) return false;
    {
      std::lock_guard<std::mutex> lock(pool.mutex_);
      while (static_cast<int>(pool.workers_.size()) < count - 1) {
        int number = static_cast<int>(pool.workers_.size()) + 1;
        pool.workers_.emplace_back([&pool, number] { pool.loop(number); });
      }
      pool.work_ = &work;
      pool.count_ = count;
      pool.left_.store(count - 1, std::memory_order_relaxed);
      pool.job_.fetch_add(1, std::memory_order_release);
    }
    pool.wake_.notify_all();
    work(0);
    for (int spins = 0; pool.left_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < 4096) relax();
      else sched_yield();
    }
    return true;
  }

 private:
  // Never destroyed: threads may still wait in it when the process ends.
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  void loop(int number) {
    unsigned seen = 0;
    while (true) {
      for (int spins = 0; spins < 2048 && job_.load(std::memory_order_acquire) == seen; ++spins) relax();
      const std::function<void(int)>* work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return job_.load(std::memory_order_relaxed) != seen; });
        seen = job_.load(std::memory_order_relaxed);
        if (number >= count_) continue;
        work = work_;
      }
      (*work)(number);
      left_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  int count_ = 0;
  std::atomic<int> left_{0};
  std::atomic<unsigned> job_{0};
  const pid_t process_ = getpid();  // a forked child has no workers
};

}  // namespace jaxrnn

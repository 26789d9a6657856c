// Work in equal right for all threads of XLA's pool: whoever is free takes the next task.
//
// Waking a thread that sleeps takes longer than many a task does, and a step is hundreds of calls, a fraction of a
// millisecond apart. So a thread that has helped with one call stays awake for a while, looking for the next.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace fineserve {

constexpr std::chrono::microseconds kAwake{500};  // after a thread's last task

// The tasks of one call.
class Call {
 public:
  virtual ~Call() = default;

  // Takes tasks until none is left.
  void work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      run(i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }
  bool is_done() const { return done_.load(std::memory_order_acquire) == count_; }

 protected:
  explicit Call(int64_t count) : count_(count) {}
  virtual void run(int64_t i) const = 0;

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0}, done_{0};
};

inline void wait_a_little(int64_t times) {
  if (times > 64) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Where threads that are awake find the newest call.
class Board {
 public:
  void post(std::shared_ptr<Call> call) {
    const std::lock_guard<std::mutex> guard(mutex_);
    call_ = std::move(call);
    posted_.fetch_add(1, std::memory_order_release);
  }
  // How many are looking.
  int64_t num_awake() const { return awake_.load(std::memory_order_relaxed); }

  // Helps with the calls that are posted, until there was none for `kAwake`.
  void watch() {
    using Clock = std::chrono::steady_clock;
    awake_.fetch_add(1, std::memory_order_relaxed);
    int64_t seen = 0;
    auto end = Clock::now() + kAwake;
    for (int64_t times = 0; (times & 15) != 15 || Clock::now() < end; ++times) {
      const int64_t posted = posted_.load(std::memory_order_acquire);
      if (posted == seen) {
        wait_a_little(times);
        continue;
      }
      seen = posted;
      newest()->work();
      times = 0, end = Clock::now() + kAwake;
    }
    awake_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  std::shared_ptr<Call> newest() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return call_;
  }

  std::mutex mutex_;
  std::shared_ptr<Call> call_;
  std::atomic<int64_t> posted_{0}, awake_{0};
};

inline Board& board() {
  static Board* const only = new Board;  // never destroyed: threads may still look when the process ends
  return *only;
}

// Runs `body(i)` for every i below `count`; returns when all are done.
//
// The caller takes tasks itself and waits only for those that another thread is at, so it does not matter whether the
// pool has a thread to spare, nor whether the caller is one of its threads.
template <class Body>
void run_tasks(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  const int64_t threads = pool.num_threads();
  const int64_t helpers = (threads < count ? threads : count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Own : Call {
    Own(int64_t count, const Body* body) : Call(count), body(body) {}
    void run(int64_t i) const override { (*body)(i); }
    const Body* const body;  // of the caller: looked at only for tasks that it waits for
  };
  auto call = std::make_shared<Own>(count, &body);  // a helper may begin when all is over
  board().post(call);
  for (int64_t i = board().num_awake(); i < helpers; ++i) pool.Schedule([] { board().watch(); });
  call->work();
  for (int64_t times = 0; !call->is_done(); ++times) wait_a_little(times > 4000 ? times : 0);
}

}  // namespace fineserve

// Work in equal right for all threads of XLA's pool: whoever is free takes the next task.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace fineserve {

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
  struct State {
    State(int64_t count, const Body* body) : count(count), body(body) {}
    void work() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        (*body)(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
    const int64_t count;
    const Body* const body;  // of the caller: looked at only for tasks that it waits for
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>(count, &body);  // a helper may begin when all is over
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->work(); });
  state->work();
  for (int64_t spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 4000) std::this_thread::yield();
  }
}

}  // namespace fineserve

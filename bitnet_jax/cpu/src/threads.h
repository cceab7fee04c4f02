// Loops over a pool of threads: XLA's own, through its FFI, or what tests put in its place.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <thread>

namespace bitnet {

// The floating-point mode of this thread (rounding, treatment of subnormal numbers); results must not depend on who computes them.
inline uint64_t FloatMode() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr() & ~0x3full;  // without the flags of what has happened
#elif defined(__aarch64__)
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

inline void SetFloatMode([[maybe_unused]] uint64_t mode) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads of a pool that have ended a loop and stay for the next one. Waking a thread takes tens of microseconds, and a step of a model is
// a hundred loops of as many microseconds each.
class Crew {
 public:
  static Crew& Get() {
    static Crew& crew = *new Crew;  // never destroyed: threads may stay while the process ends
    return crew;
  }

  // Hands `work` to a thread that stays; false where none does.
  bool Hand(std::function<void()> work) {
    for (Seat& seat : seats_) {
      int waiting = kWaiting;
      if (seat.state.load(std::memory_order_relaxed) != kWaiting || !seat.state.compare_exchange_strong(waiting, kTaken)) continue;
      seat.work = std::move(work);
      seat.state.store(kReady, std::memory_order_release);
      return true;
    }
    return false;
  }

  // Stays, and does what is handed to this thread, until nothing was for `kStay`.
  void Stay() {
    for (Seat& seat : seats_) {
      int free = kFree;
      if (seat.state.load(std::memory_order_relaxed) != kFree || !seat.state.compare_exchange_strong(free, kWaiting)) continue;
      while (Handed(seat)) {
        const std::function<void()> work = std::move(seat.work);
        seat.work = nullptr;
        work();
        seat.state.store(kWaiting, std::memory_order_release);
      }
      return;
    }
  }

 private:
  static constexpr std::chrono::microseconds kStay{100};
  enum State { kFree, kWaiting, kTaken, kReady };
  struct alignas(64) Seat {
    std::atomic<int> state{kFree};
    std::function<void()> work;
  };

  static bool Handed(Seat& seat) {
    const auto end = std::chrono::steady_clock::now() + kStay;
    for (;;) {
      for (int spins = 0; spins < 32; spins++, Pause()) {
        if (seat.state.load(std::memory_order_acquire) == kReady) return true;
      }
      int waiting = kWaiting;
      if (std::chrono::steady_clock::now() > end && seat.state.compare_exchange_strong(waiting, kFree)) return false;
    }
  }

  Seat seats_[64];
};

// Calls work(i) for every i below `blocks`, on up to `threads` threads, the caller's among them. Blocks are claimed one by one, so that
// the caller never waits for a thread that has not begun, and a slow thread does less. Where memory ends in one, the caller throws.
template <typename Pool, typename Work>
void ParallelFor(Pool& pool, int64_t threads, int64_t blocks, const Work& work) {
  if (threads > blocks) threads = blocks;
  if (threads <= 1) {
    for (int64_t i = 0; i < blocks; i++) work(i);
    return;
  }
  struct Job {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
  };
  auto job = std::make_shared<Job>();  // outlives this call in threads that come too late to claim anything
  const Work* body = &work;
  const uint64_t mode = FloatMode();
  auto run = [job, body, blocks, mode] {
    int64_t i = job->next.fetch_add(1, std::memory_order_relaxed);
    if (i >= blocks) return;
    const uint64_t before = FloatMode();
    SetFloatMode(mode);
    for (; i < blocks; i = job->next.fetch_add(1, std::memory_order_relaxed)) {
      try {
        (*body)(i);
      } catch (...) {  // nothing may leave a thread of the pool, nor this call while others use what it holds
        job->failed.store(true, std::memory_order_relaxed);
      }
      job->done.fetch_add(1, std::memory_order_release);
    }
    SetFloatMode(before);
  };
  try {
    for (int64_t t = 1; t < threads; t++) {
      if (Crew::Get().Hand(run)) continue;
      pool.Schedule([run] {
        run();
        Crew::Get().Stay();
      });
    }
  } catch (const std::bad_alloc&) {  // with fewer threads, then: some may have begun, on what this call holds
  }
  run();
  for (int spins = 0; job->done.load(std::memory_order_acquire) < blocks; spins++) {
    if (spins < 1000) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
  if (job->failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

// `threads` as a call asks for it (-1: all that the pool has), and no more than there are.
template <typename Pool>
int64_t Threads(const Pool& pool, int64_t threads) {
  const int64_t available = pool.num_threads() > 1 ? pool.num_threads() : 1;
  return threads < 0 || threads > available ? available : threads;
}

}  // namespace bitnet

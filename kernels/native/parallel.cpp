// The pool behind parallel_for: one job at a time, items handed out by a counter.
//
// Not OpenMP: its barriers spin, and on a core shared with another process each spin costs a
// scheduler quantum (8 ms for a layer that computes for half a millisecond, measured on 2 cores).
// Helpers here sleep on a condition variable, and a second caller meanwhile (another Python thread)
// simply works alone.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace moetier {
namespace {

constexpr int kMaxHelpers = 255;

struct Job {
  void (*body)(const void*, int64_t);
  const void* context;
  int64_t num_items;
  std::atomic<int64_t> next{0};
  int places;       // helpers that may still join; guarded by the pool's mutex
  int working = 0;  // helpers at work; guarded by the pool's mutex

  void work() {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < num_items;)
      body(context, item);
  }
};

class Pool {
 public:
  // Runs the job with helpers; false when another caller has them.
  bool try_run(Job* job) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(job->places);
      job_ = job;
    }
    wake_.notify_all();
    job->work();
    // All items are handed out. Close the door, then wait for the helpers that are inside.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [&] { return job->working == 0; });
    return true;
  }

 private:
  void grow(int helpers) {
    while (num_helpers_ < std::min(helpers, kMaxHelpers)) {
      try {
        std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: those that are there, and the caller, do the work
      }
      num_helpers_++;
    }
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return job_ && job_->places > 0; });
      Job* job = job_;
      job->places--;
      job->working++;
      lock.unlock();
      job->work();
      lock.lock();
      // Nobody joins a job whose items are all taken.
      job->places = 0;
      if (--job->working == 0) done_.notify_all();
    }
  }

  std::mutex turn_;   // held by the caller whose job runs
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int num_helpers_ = 0;
};

// Never destroyed: helpers may sleep in it while the process exits. A child made by fork() has no
// helpers, which parallel_for tolerates: its caller does all items itself.
Pool& pool() {
  static Pool* const the_pool = new Pool;
  return *the_pool;
}

}  // namespace

void parallel_for(int64_t num_items, int num_threads, void (*body)(const void*, int64_t),
                  const void* context) {
  const int helpers = static_cast<int>(std::min<int64_t>(num_threads, num_items)) - 1;
  if (helpers > 0) {
    Job job{body, context, num_items, {0}, helpers};
    if (pool().try_run(&job)) return;
  }
  for (int64_t item = 0; item < num_items; item++) body(context, item);
}

}  // namespace moetier

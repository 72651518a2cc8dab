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
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "moetier_kernels.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace moetier {
namespace {

constexpr int kMaxHelpers = 255;

void pin_this_thread(int32_t core) {
#if defined(__linux__)
  if (core < 0 || core >= CPU_SETSIZE) return;
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(core, &only);
  pthread_setaffinity_np(pthread_self(), sizeof only, &only);  // a refusal costs speed only
#else
  (void)core;
#endif
}

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

  void pin(const int32_t* cores, int64_t num_cores) {
    if (num_cores < 1) return;
    std::lock_guard<std::mutex> lock(mutex_);
    cores_.assign(cores, cores + num_cores);
    wish_++;
  }

 private:
  void grow(int helpers) {
    while (num_helpers_ < std::min(helpers, kMaxHelpers)) {
      try {
        std::thread([this, place = num_helpers_] { help(place); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: those that are there, and the caller, do the work
      }
      num_helpers_++;
    }
  }

  void help(int place) {
    std::unique_lock<std::mutex> lock(mutex_);
    int64_t pinned = 0;  // the wish that this helper has followed
    while (true) {
      wake_.wait(lock, [&] { return job_ && job_->places > 0; });
      if (pinned != wish_) {
        pinned = wish_;
        pin_this_thread(cores_[static_cast<size_t>(place + 1) % cores_.size()]);
      }
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
  std::vector<int32_t> cores_;  // where helpers shall stay; each moves itself when it next wakes
  int64_t wish_ = 0;            // counts the calls of pin
};

// Never destroyed: helpers may sleep in it while the process exits. A child made by fork() has no
// helpers, which parallel_for tolerates: its caller does all items itself.
Pool& pool() {
  static Pool* const the_pool = new Pool;
  return *the_pool;
}

}  // namespace

void pin_helpers(const int32_t* cores, int64_t num_cores) { pool().pin(cores, num_cores); }

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

int32_t moetier_pin_helpers(const int32_t* cores, int64_t num_cores) {
  try {
    moetier::pin_helpers(cores, num_cores);
  } catch (const std::bad_alloc&) {
    return MOETIER_NO_MEMORY;
  }
  return MOETIER_OK;
}

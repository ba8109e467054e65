#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace skd {
namespace {

class ThreadPool {
 public:
  // Callers that meet (autograd runs several threads) do not queue: all but one find the pool taken and work alone.
  bool try_run(int64_t items, int threads, const std::function<void(int64_t)>& run_item) {
    std::unique_lock<std::mutex> exclusive(taken_, std::try_to_lock);
    if (!exclusive) return false;
    Job job{items, run_item};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(threads - 1);
      job_ = &job;
      places_ = threads - 1;
    }
    for (int i = 1; i < threads; ++i) wake_.notify_one();
    job.work();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      job_ = nullptr;  // from here on nobody begins
      idle_.wait(lock, [this] { return working_ == 0; });
    }
    if (job.error) std::rethrow_exception(job.error);
    return true;
  }

 private:
  struct Job {
    int64_t items;
    const std::function<void(int64_t)>& run_item;
    std::atomic<int64_t> next{0};
    std::once_flag failed;
    std::exception_ptr error;

    // An exception ends the job for all threads and is the caller's to throw, when none of them uses the job any more.
    void work() noexcept {
      try {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run_item(item);
      } catch (...) {
        next.store(items, std::memory_order_relaxed);
        std::call_once(failed, [this] { error = std::current_exception(); });
      }
    }
  };

  // A thread the system refuses is work for the others.
  void start(int threads) {
    try {
      for (; started_ < threads; ++started_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ != nullptr && places_ > 0; });
      Job* job = job_;
      --places_;
      ++working_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--working_ == 0) idle_.notify_one();
    }
  }

  std::mutex taken_, mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  int places_ = 0, working_ = 0, started_ = 0;
};

// Lives until the process ends, since its threads do.
ThreadPool* pool = nullptr;

// A forked child has none of its parent's threads, and perhaps locks that they held.
ThreadPool& this_process_pool() {
  static const bool once = [] {
    pool = new ThreadPool;
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });
    return true;
  }();
  (void)once;
  return *pool;
}

}  // namespace

void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& run) {
  threads = int(std::min<int64_t>(threads, items));
  if (threads > 1 && this_process_pool().try_run(items, threads, run)) return;
  for (int64_t item = 0; item < items; ++item) run(item);
}

}  // namespace skd

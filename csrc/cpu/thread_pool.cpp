#include "cpu/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace skd {
namespace {

class ThreadPool {
 public:
  void run(int64_t items, int threads, const std::function<void(int64_t)>& run_item) {
    Job job{items, run_item};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < threads - 1; ++started_) std::thread([this] { serve(); }).detach();
      job_ = &job;
      places_ = threads - 1;
    }
    for (int i = 1; i < threads; ++i) wake_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // from here on nobody begins
    idle_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  struct Job {
    int64_t items;
    const std::function<void(int64_t)>& run_item;
    std::atomic<int64_t> next{0};
    void work() {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run_item(item);
    }
  };

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

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  int places_ = 0, working_ = 0, started_ = 0;
};

std::mutex pool_in_use;

// Lives until the process ends, since its threads do. A forked child has none of the threads and makes its own pool.
ThreadPool& pool() {
  static ThreadPool* current = new ThreadPool;
  static pid_t owner = getpid();
  if (owner != getpid()) {
    current = new ThreadPool;
    owner = getpid();
  }
  return *current;
}

}  // namespace

void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& run) {
  threads = int(std::min<int64_t>(threads, items));
  std::unique_lock<std::mutex> exclusive(pool_in_use, std::defer_lock);
  // Callers that meet (autograd runs several threads) do not queue: all but one work alone.
  if (threads > 1 && exclusive.try_lock()) return pool().run(items, threads, run);
  for (int64_t item = 0; item < items; ++item) run(item);
}

}  // namespace skd

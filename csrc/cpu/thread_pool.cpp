#include "cpu/thread_pool.h"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace skd {
namespace {

class ThreadPool {
 public:
  // Callers that meet (autograd runs several threads) do not queue: all but one find the pool taken and work alone.
  bool try_run(int threads, const std::function<void()>& work) {
    std::unique_lock<std::mutex> exclusive(taken_, std::try_to_lock);
    if (!exclusive) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(threads - 1);
      work_ = &work;
      places_ = threads - 1;
    }
    for (int i = 1; i < threads; ++i) wake_.notify_one();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    work_ = nullptr;  // from here on nobody begins
    idle_.wait(lock, [this] { return working_ == 0; });
    return true;
  }

 private:
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
      wake_.wait(lock, [this] { return work_ != nullptr && places_ > 0; });
      const std::function<void()>& work = *work_;
      --places_;
      ++working_;
      lock.unlock();
      work();
      lock.lock();
      if (--working_ == 0) idle_.notify_one();
    }
  }

  std::mutex taken_, mutex_;
  std::condition_variable wake_, idle_;
  const std::function<void()>* work_ = nullptr;
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

bool run_in_pool(int threads, const std::function<void()>& work) { return this_process_pool().try_run(threads, work); }

}  // namespace skd

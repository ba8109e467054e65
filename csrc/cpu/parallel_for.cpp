#include "cpu/parallel_for.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "cpu/pytorch_threads.h"
#include "cpu/thread_pool.h"

namespace skd {
namespace {

class Job {
 public:
  Job(int64_t items, int threads, const std::function<void(int64_t, int64_t)>& run)
      : items_(items), threads_(threads), places_(threads), run_(run) {}

  // On every thread. An exception ends the job for all of them and is the caller's to throw, when none works any more.
  void work() noexcept {
    if (places_.fetch_sub(1, std::memory_order_relaxed) <= 0) return;
    try {
      for (int64_t begin, end; take(begin, end);) run_(begin, end);
    } catch (...) {
      next_.store(items_, std::memory_order_relaxed);
      std::call_once(failed_, [this] { error_ = std::current_exception(); });
    }
  }

  void throw_error() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  bool take(int64_t& begin, int64_t& end) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= items_) return false;
      end = begin + std::max<int64_t>(1, (items_ - begin) / (2 * threads_));
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

  const int64_t items_;
  const int threads_;
  std::atomic<int> places_;
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t, int64_t)>& run_;
  std::once_flag failed_;
  std::exception_ptr error_;
};

}  // namespace

void parallel_for(int64_t items, int threads, const std::function<void(int64_t, int64_t)>& run) {
  threads = int(std::min<int64_t>(threads, items));
  if (threads > 1) {
    Job job(items, threads, run);
    const std::function<void()> work = [&] { job.work(); };
    if (run_on_pytorchs_threads(work) || run_in_pool(threads, work)) return job.throw_error();
  }
  if (items > 0) run(0, items);
}

}  // namespace skd

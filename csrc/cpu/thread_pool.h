// Threads of our own, where PyTorch has none to share. The caller works too and waits only for threads that have begun:
// a thread the scheduler has not woken yet delays nobody.
#pragma once

#include <functional>

namespace skd {

// Calls work() on this thread, and on up to `threads` - 1 others as they wake up; it must not throw. False, without a
// call, if another thread has the pool.
bool run_in_pool(int threads, const std::function<void()>& work);

}  // namespace skd

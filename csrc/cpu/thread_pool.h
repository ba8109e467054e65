// Threads for loops over items. The caller works too and waits only for threads that have begun: a thread the scheduler
// has not woken yet delays nobody, so a busy machine costs no more than one thread's speed.
#pragma once

#include <cstdint>
#include <functional>

namespace skd {

// Calls run(item) once for every item in [0, items), on at most `threads` threads, in no order.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& run);

}  // namespace skd

// Loops over items on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace skd {

// Calls run(begin, end) for ranges that make up [0, items), on at most `threads` threads, in no order. A thread goes
// from one range to the next, which are long at first and single items at last.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t begin, int64_t end)>& run);

}  // namespace skd

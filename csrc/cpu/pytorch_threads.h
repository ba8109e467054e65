// The threads that PyTorch's own CPU operations run on.
//
// OpenMP's threads wait for work by looking for it, for some milliseconds after each of PyTorch's operations. Other
// threads would have to share the cores with them, which then often leaves the caller alone with the work.
#pragma once

#include <functional>

namespace skd {

// Whether PyTorch has threads that this process can use: not in a child of fork(), where OpenMP's may be lost, and only
// on Linux.
bool pytorch_has_threads();

// Calls work() on all of them, this one included, and waits for all; as many as torch.get_num_threads() says. False if
// there are none.
bool run_on_pytorchs_threads(const std::function<void()>& work);

}  // namespace skd

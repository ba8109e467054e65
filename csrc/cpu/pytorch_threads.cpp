#include "cpu/pytorch_threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <fstream>
#include <limits>
#include <string>

namespace skd {
namespace {

// What compilers make of `#pragma omp parallel`. GNU's OpenMP has it, and LLVM's and Intel's for its sake. 0 threads
// are as many as the calling thread has set: another number each time would let GNU's end and begin threads.
typedef void (*GompParallel)(void (*work)(void*), void* argument, unsigned threads, unsigned flags);

// From the library that PyTorch uses, whatever its name: a second one would have threads of its own.
GompParallel find_gomp_parallel() {
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch == nullptr ? nullptr : reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
}

// Whether this process was forked and has not begun a program of its own since. Its parent may have used OpenMP.
bool was_forked_before_loading() {
  constexpr unsigned long kForkedButNotExecuted = 0x40;  // PF_FORKNOEXEC
  std::ifstream file("/proc/self/stat");
  file.ignore(std::numeric_limits<std::streamsize>::max(), ')');  // the number, and the name in parentheses
  std::string state;
  long parent, group, session, terminal, terminal_group;
  unsigned long flags = 0;
  file >> state >> parent >> group >> session >> terminal >> terminal_group >> flags;
  return !file || (flags & kForkedButNotExecuted) != 0;
}

bool is_forked = was_forked_before_loading();
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

GompParallel gomp_parallel() {
  static const GompParallel found = find_gomp_parallel();
  return is_forked || watching_forks != 0 ? nullptr : found;
}

}  // namespace

bool pytorch_has_threads() { return gomp_parallel() != nullptr; }

bool run_on_pytorchs_threads(const std::function<void()>& work) {
  const GompParallel run = gomp_parallel();
  if (run == nullptr) return false;
  run([](void* argument) { (*static_cast<const std::function<void()>*>(argument))(); },
      const_cast<std::function<void()>*>(&work), 0, 0);
  return true;
}

}  // namespace skd

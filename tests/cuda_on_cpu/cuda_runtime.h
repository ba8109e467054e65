// As much of CUDA as skd's kernels use, on the CPU, to run them where there is no GPU.
//
// A block's threads are fibers that run in a new random order from barrier to barrier, or, with SKD_CUDA_THREADS, real
// threads, for ThreadSanitizer. Blocks run one after another in random order. Shared memory is filled with NaN for
// each block. Asynchronous copies happen when they are waited for. A barrier that not all threads reach ends the
// program, and, with -fsanitize=alignment, so does an access through an address that its type's alignment forbids.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define SKD_SHARED_MEMORY(name) char* const name = cuda_on_cpu::shared_memory()

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using std::min;

// --- Threads of a block ---

namespace cuda_on_cpu {

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", why);
  std::abort();
}

// Where an address was used, as the compiler describes it.
struct Place {
  const char* file;
  uint32_t line, column;
};

struct Thread {
  dim3 index{0, 0, 0};
  std::vector<std::pair<void*, const void*>> copies;  // begun and not waited for
};

struct Block {
  dim3 index{0, 0, 0}, grid, size;
  char* shared = nullptr;
  uint64_t exchange[64][32];  // what the lanes of each warp hand each other
};

inline Block& block() {
  static Block one;
  return one;
}
inline char* shared_memory() { return block().shared; }

inline std::mt19937& random() {
  static std::mt19937 generator(1);
  return generator;
}

#if defined(SKD_CUDA_THREADS)

// Two rounds share no mutex: what a thread did after one barrier is not ordered before what a thread does that wakes up
// from it late, so that ThreadSanitizer sees their race however late that is.
class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait() {
    const unsigned number = number_.load(std::memory_order_relaxed);
    Round& round = rounds_[number % 2];
    std::unique_lock<std::mutex> lock(round.mutex);
    if (++round.arrived == count_) {
      round.arrived = 0;
      number_.store(number + 1, std::memory_order_relaxed);
      round.all.notify_all();
    } else {
      round.all.wait(lock, [&] { return number_.load(std::memory_order_relaxed) != number; });
    }
  }

 private:
  struct Round {
    std::mutex mutex;
    std::condition_variable all;
    unsigned arrived = 0;
  };
  Round rounds_[2];
  unsigned count_;
  std::atomic<unsigned> number_{0};
};

struct Barriers {
  Barrier of_block;
  std::vector<std::unique_ptr<Barrier>> of_warp;
  explicit Barriers(unsigned threads) : of_block(threads) {
    for (unsigned w = 0; w < threads; w += 32) of_warp.emplace_back(new Barrier(std::min(32u, threads - w)));
  }
};
inline Barriers*& barriers() {
  static Barriers* those;
  return those;
}
inline Thread& current() {
  thread_local Thread one;
  return one;
}
inline void wait_for_block() { barriers()->of_block.wait(); }
inline void wait_for_warp() { barriers()->of_warp[current().index.x / 32]->wait(); }

inline void run_block(const std::function<void()>& kernel) {
  const unsigned count = block().size.x;
  Barriers those(count);
  barriers() = &those;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      current() = Thread();
      current().index = dim3(i, 0, 0);
      kernel();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#else

enum class State { ready, at_block, at_warp, done };

// Begins by a context, whose stack it needs, and is then left and entered by jumps: these call no kernel.
struct Fiber : Thread {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  bool begun = false;
  static constexpr size_t kStack = 128 << 10;
};

struct Scheduler {
  jmp_buf place;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* running = nullptr;
  const std::function<void()>* kernel = nullptr;
};
inline Scheduler& scheduler() {
  static Scheduler one;
  return one;
}
inline Thread& current() { return *scheduler().running; }

inline void yield(State state) {
  Fiber* const self = scheduler().running;
  self->state = state;
  if (_setjmp(self->place) == 0) _longjmp(scheduler().place, 1);
}
inline void wait_for_block() { yield(State::at_block); }
inline void wait_for_warp() { yield(State::at_warp); }

inline void run_kernels() {
  while (true) {
    (*scheduler().kernel)();
    yield(State::done);
  }
}

// Until the fiber yields. Nothing of this function's own is changed between its two returns from _setjmp.
inline __attribute__((noinline)) void resume(Fiber* fiber) {
  Scheduler& s = scheduler();
  s.running = fiber;
  if (_setjmp(s.place) != 0) return;
  if (fiber->begun) _longjmp(fiber->place, 1);
  fiber->begun = true;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = Fiber::kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, run_kernels, 0);
  setcontext(&fiber->context);
}

inline void run_block(const std::function<void()>& kernel) {
  Scheduler& s = scheduler();
  const unsigned count = block().size.x;
  s.kernel = &kernel;
  while (s.fibers.size() < count) s.fibers.emplace_back(new Fiber);
  std::vector<Fiber*> order;
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = *s.fibers[i];
    fiber.index = dim3(i, 0, 0);
    fiber.copies.clear();
    fiber.state = State::ready;
    order.push_back(&fiber);
  }
  const auto all = [&](unsigned first, unsigned end, State state) {
    for (unsigned i = first; i < end; ++i) {
      if (s.fibers[i]->state != state) return false;
    }
    return true;
  };
  while (!all(0, count, State::done)) {
    std::shuffle(order.begin(), order.end(), random());
    bool progress = false;
    for (Fiber* fiber : order) {
      if (fiber->state != State::ready) continue;
      progress = true;
      resume(fiber);
    }
    for (unsigned w = 0; w < count; w += 32) {
      const unsigned end = std::min(count, w + 32);
      if (!all(w, end, State::at_warp)) continue;
      progress = true;
      for (unsigned i = w; i < end; ++i) s.fibers[i]->state = State::ready;
    }
    if (all(0, count, State::at_block)) {
      progress = true;
      for (unsigned i = 0; i < count; ++i) s.fibers[i]->state = State::ready;
    }
    if (!progress) fail("threads wait for others that wait elsewhere or have ended");
  }
}

#endif

template <class Kernel>
void launch(dim3 grid, dim3 size, size_t shared_bytes, Kernel kernel) {
  Block& b = block();
  std::vector<dim3> indices;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) indices.push_back(dim3(x, y, 0));
  }
  std::shuffle(indices.begin(), indices.end(), random());
  const size_t bytes = (shared_bytes + 127) / 128 * 128;
  std::unique_ptr<void, decltype(&std::free)> arena(bytes ? std::aligned_alloc(128, bytes) : nullptr, &std::free);
  for (const dim3& index : indices) {
    b.index = index, b.grid = grid, b.size = size, b.shared = static_cast<char*>(arena.get());
    if (bytes) std::memset(arena.get(), 0xff, bytes);  // NaN in every format
    run_block(kernel);
  }
}

}  // namespace cuda_on_cpu

namespace cuda_on_cpu {
struct Coordinate {
  unsigned (*get)();
  operator unsigned() const { return get(); }
};
struct Coordinates {
  Coordinate x, y;
};
}  // namespace cuda_on_cpu
static const cuda_on_cpu::Coordinates threadIdx{{[] { return cuda_on_cpu::current().index.x; }},
                                                {[] { return cuda_on_cpu::current().index.y; }}};
static const cuda_on_cpu::Coordinates blockIdx{{[] { return cuda_on_cpu::block().index.x; }},
                                               {[] { return cuda_on_cpu::block().index.y; }}};
static const cuda_on_cpu::Coordinates gridDim{{[] { return cuda_on_cpu::block().grid.x; }},
                                              {[] { return cuda_on_cpu::block().grid.y; }}};

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  if (mask != 0xffffffffu) cuda_on_cpu::fail("a shuffle of less than a warp");
  const unsigned lane = threadIdx.x % 32;
  uint64_t (&slots)[32] = cuda_on_cpu::block().exchange[threadIdx.x / 32];
  std::memcpy(&slots[lane], &value, sizeof value);
  cuda_on_cpu::wait_for_warp();
  std::memcpy(&value, &slots[lane ^ unsigned(offset)], sizeof value);
  cuda_on_cpu::wait_for_warp();
  return value;
}

inline unsigned atomicInc(unsigned* address, unsigned most) {
  unsigned old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(address, &old, old >= most ? 0 : old + 1, false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_SEQ_CST)) {
  }
  return old;
}
inline void __threadfence() {}
template <class T>
T __ldcg(const T* p) {
  return *p;
}

namespace skd {
inline void copy_16_bytes(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) & 15) {
    cuda_on_cpu::fail("16 bytes are copied from or to an address that is no multiple of 16");
  }
  cuda_on_cpu::current().copies.emplace_back(shared, global);
}
inline void wait_for_copies() {
  for (const auto& [to, from] : cuda_on_cpu::current().copies) std::memcpy(to, from, 16);
  cuda_on_cpu::current().copies.clear();
}
}  // namespace skd

// What -fsanitize=alignment calls, in the place of the compiler's library: a GPU's load or store of 16 bytes that
// begins elsewhere is an error, a CPU's is not. The second is Clang's, for what it concludes from an allocation.
#define SKD_CALLED_BY_COMPILER extern "C" __attribute__((weak, used)) void
SKD_CALLED_BY_COMPILER __ubsan_handle_type_mismatch_v1_abort(const cuda_on_cpu::Place* place, uintptr_t address) {
  std::fprintf(stderr, "cuda_on_cpu: %s:%u: address %#lx\n", place->file, place->line, (unsigned long)address);
  cuda_on_cpu::fail("an address is no multiple of its type's alignment");
}
SKD_CALLED_BY_COMPILER __ubsan_handle_alignment_assumption_abort(const cuda_on_cpu::Place* place, uintptr_t address,
                                                                 uintptr_t, uintptr_t) {
  __ubsan_handle_type_mismatch_v1_abort(place, address);
}

// --- The host's side ---

// What is queued on a stream happens at once. The stream 3 is always being captured.
typedef struct CUstream_st* cudaStream_t;
#define cudaStreamPerThread (reinterpret_cast<cudaStream_t>(2))
enum cudaError_t { cudaSuccess };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  cuda_on_cpu::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool captured = stream == reinterpret_cast<cudaStream_t>(3);
  return *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  return *address = &symbol, cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class T>
cudaError_t cudaFuncSetAttribute(T*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, T*) {
  return cudaSuccess;
}

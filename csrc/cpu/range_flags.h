// Whether arithmetic left the range of its numbers, as the processor notes by the way.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <cfenv>
#endif

namespace skd {
namespace {

// From construction or clear() on. What the program around it has noted, and whether it wants to be interrupted, is put
// back in the end.
class RangeFlags {
 public:
  RangeFlags() : before_(read()) { clear(); }
  ~RangeFlags() { write(before_); }
  RangeFlags(const RangeFlags&) = delete;
  RangeFlags& operator=(const RangeFlags&) = delete;

  void clear() { write(cleared(before_)); }

  // Whether something was rounded to a subnormal number or to zero, overflowed, or was infinity less infinity; or, on
  // x86, was computed from a subnormal number.
  bool raised() const { return (read() & kFlags) != 0; }

  // Whether they are noted at all. Some emulators of processors do not.
  static bool work() {
    volatile float small = 1e-30f;
    RangeFlags flags;
    volatile float square = small * small;
    return square < 1.17549435e-38f && flags.raised();  // compared with a normal number, which notes nothing
  }

 private:
  // What is computed lies in memory by then, and what is loaded later is not computed before.
  static void settle() { __asm__ __volatile__("" ::: "memory"); }

#if defined(__x86_64__)
  static constexpr unsigned kFlags =
      _MM_EXCEPT_UNDERFLOW | _MM_EXCEPT_OVERFLOW | _MM_EXCEPT_INVALID | _MM_EXCEPT_DENORM;
  // Nor are subnormal numbers taken for zeros meanwhile, as torch.set_flush_denormal may have asked of one thread.
  static unsigned cleared(unsigned state) {
    constexpr unsigned kDenormalsAreZeros = 1 << 6;
    return (state & ~(_MM_EXCEPT_MASK | _MM_FLUSH_ZERO_MASK | kDenormalsAreZeros)) | _MM_MASK_MASK;
  }
  static unsigned read() {
    settle();
    return _mm_getcsr();
  }
  static void write(unsigned state) {
    settle();
    _mm_setcsr(state);
    settle();
  }
  unsigned before_;
#else
  static constexpr int kFlags = FE_UNDERFLOW | FE_OVERFLOW | FE_INVALID;
  static int cleared(int) { return 0; }
  static int read() {
    settle();
    return std::fetestexcept(kFlags);
  }
  static void write(int flags) {
    std::feclearexcept(kFlags & ~flags);
    if (flags & kFlags) std::feraiseexcept(flags & kFlags);
    settle();
  }
  int before_;
#endif
};

}  // namespace
}  // namespace skd

// The scratch memory of a call, in pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace skd {
namespace {

// Every piece begins on a cache line of its own. Without memory it only counts the bytes.
class ScratchPieces {
 public:
  explicit ScratchPieces(void* memory) : begin_(static_cast<char*>(memory)), at_(begin_) {}

  template <class T>
  void take(T*& piece, int64_t count) {
    piece = reinterpret_cast<T*>(at_);
    at_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
  }
  size_t bytes() const { return size_t(at_ - begin_); }

 private:
  char *begin_, *at_;
};

}  // namespace
}  // namespace skd

// Memory that is wanted soon, fetched while something else is computed.
//
// A processor has room for some 20 lines on their way; a burst of more waits for them instead of computing. So what is
// to be fetched is announced first, and goes a few lines at a time, in steps between pieces of arithmetic. It goes into
// the second-level cache: in the first it would take the place of what is computed with.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/tile.h"

namespace skd {
namespace SKD_ISA {
namespace {

inline int64_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

class Prefetcher {
 public:
  // Adds the block's part of a map, from which `width` channels are pooled.
  void add(const Map& map, int64_t width, const Block& block) {
    const int64_t size = bytes_of(map.dtype);
    const int64_t first = channel_window(block.channel, map.shape[1], width).begin;
    const int64_t channels = channel_window(block.channel + block.channels - 1, map.shape[1], width).end - first;
    const int64_t rows = block.rows, columns = map.shape[3];
    const char* const begin =
        map.data + (block.image * map.stride[0] + first * map.stride[1] + block.row * map.stride[2]) * size;
    switch (order_of(map)) {
      case Order::channels:
        return add({begin, channels * size, {columns, rows}, {map.stride[3] * size, map.stride[2] * size}});
      case Order::planes: return add({begin, rows * columns * size, {channels, 1}, {map.stride[1] * size, 0}});
      case Order::any: return;
    }
  }

  // Contiguous pieces of memory, in rows of pieces.
  struct Region {
    const char* begin;
    int64_t piece, count[2], step[2];  // in bytes; the second count and step are of the rows
  };
  void add(const Region& region) {
    regions_[count_] = region;
    lines_ += region.count[0] * region.count[1] * divide_up(region.piece, kLine);
    if (count_++ == 0) begin_piece();
  }

  // From now on all is done in this many steps.
  void divide(int64_t steps) { lines_in_step_ = divide_up(lines_, steps); }

  SKD_INLINE void step() {
    for (int64_t i = 0; i < lines_in_step_ && at_ < end_; ++i) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      if (at_ >= end_) next_piece();
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  void next_piece() {
    const Region* region = &regions_[region_];
    if (++index_[0] == region->count[0]) index_[0] = 0, ++index_[1];
    if (index_[1] == region->count[1]) {
      if (++region_ == count_) return;
      index_[0] = index_[1] = 0;
    }
    begin_piece();
  }
  void begin_piece() {
    const Region& region = regions_[region_];
    at_ = region.begin + index_[0] * region.step[0] + index_[1] * region.step[1];
    end_ = at_ + region.piece;
  }

  Region regions_[3];
  int count_ = 0, region_ = 0;
  int64_t index_[2] = {0, 0};
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t lines_ = 0, lines_in_step_ = 0;
};

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd

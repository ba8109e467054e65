// Vectors of lanes, from position to position: where a transform reads and writes.
#pragma once

#include "cpu/tile.h"

namespace skd {
namespace SKD_ISA {
namespace {

template <class A>
struct TileLanes {
  A* data;
  int64_t step;  // numbers from one position to the next
  SKD_INLINE Vector<A> load(int64_t position) const { return Access<A, A>::load(data + position * step); }
  SKD_INLINE void store(int64_t position, Vector<A> v) const { Access<A, A>::store(data + position * step, v); }
};

// The vectors of a block: the map's own, where it has them (adjacent channels of the pooled width and of type A), else
// those of a tile.
template <class A>
class BlockLanes {
 public:
  BlockLanes(const Map& map, int64_t width, const Block& block, A* tile, TileShape<A> shape)
      : in_map_(has_lanes(map, width, block)), first_{tile, shape.position}, vector_(shape.vector) {
    if (in_map_) first_ = {at<A>(map, block.image, block.channel, block.row), map.stride[3]}, vector_ = kWidth<A>;
  }

  bool in_map() const { return in_map_; }
  TileLanes<A> operator[](int64_t v) const { return {first_.data + v * vector_, first_.step}; }

 private:
  static bool has_lanes(const Map& map, int64_t width, const Block& block) {
    const bool own_type = map.dtype == (sizeof(A) == sizeof(double) ? DType::float64 : DType::float32);
    const bool one_line = map.shape[2] == 1 || map.stride[2] == map.shape[3] * map.stride[3];
    return own_type && one_line && map.shape[1] == width && order_of(map) == Order::channels &&
           block.channels % kWidth<A> == 0;
  }

  bool in_map_;
  TileLanes<A> first_;
  int64_t vector_;  // numbers from one to the next
};

// The same, the tile filled.
template <class A>
BlockLanes<A> load_lanes(const Map& map, int64_t width, const Block& block, A* tile, TileShape<A> shape) {
  const BlockLanes<A> lanes(map, width, block, tile, shape);
  if (!lanes.in_map()) load_tile<A>(map, width, block, tile, shape);
  return lanes;
}

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd

#include "cuda/tile_layout.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace skd {
namespace layout {
namespace {

Order order_of(const Map& map) {
  const int64_t *n = map.shape, *s = map.stride;
  const bool positions_evenly_spaced = n[2] == 1 || n[3] == 1 || s[2] == n[3] * s[3];
  if (n[1] >= 8 && s[1] == 1 && positions_evenly_spaced) return Order::channels;
  const bool rows_contiguous = n[3] == 1 || s[3] == 1;
  const bool plane_contiguous = n[2] == 1 || s[2] == n[3];
  return rows_contiguous && plane_contiguous ? Order::planes : Order::any;
}

// Bytes between positions that follow each other.
int64_t position_stride(const Map& map) {
  return (map.shape[3] > 1 ? map.stride[3] : map.stride[2]) * bytes_of(map.dtype);
}

}  // namespace

int64_t evenly(int64_t n, int64_t most, int64_t unit) {
  most = std::max<int64_t>(1, std::min(n, most));
  if (most >= unit && most < n) most = most / unit * unit;
  const int64_t even = round_up(divide_up(n, divide_up(n, most)), unit);
  return even <= most ? even : most;
}

DeviceMap device_map(const Map& map) {
  DeviceMap part{};
  part.data = map.data;
  part.dtype = map.dtype;
  part.order = map.data == nullptr ? Order::any : order_of(map);
  std::copy(map.stride, map.stride + 4, part.stride);
  return part;
}

bool planes_adjoin(const Map& map) { return map.shape[1] == 1 || map.stride[1] == map.shape[2] * map.shape[3]; }

bool stretches_alike(const Map& map, Order order) {
  const int64_t stride = order == Order::channels ? position_stride(map) : map.stride[1] * int64_t(bytes_of(map.dtype));
  return stride % 16 == 0;
}

int64_t pitch_of(int64_t length, int64_t remainder) {
  int64_t pitch = round_up(length, 16);
  while (pitch % 128 != remainder) pitch += 16;
  return pitch;
}

int64_t lay_out_stretches(DeviceMap& part, int64_t count, int64_t length, int64_t pitch) {
  part.lanes_log2 = 0;
  while (part.lanes_log2 < 7 && (16 << part.lanes_log2) < length) ++part.lanes_log2;
  part.pitch = count == 1 ? 0 : int(pitch);
  return count == 1 ? round_up(length + 16, 16) : count * pitch + 16;
}

int as_int(int64_t n) {
  if (n > std::numeric_limits<int>::max() / 2) throw std::invalid_argument("a dimension of a map exceeds 2^30 - 1");
  return int(n);
}

}  // namespace layout
}  // namespace skd

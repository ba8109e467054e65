// A tile holds the same positions of a few channels side by side: [positions][lanes], one 64-byte line per position.
//
// Whatever a map's memory order, its numbers pass through this form (or are read as if they did), so that one
// arithmetic serves every mix of orders: a lane owns a channel, and a row's sums need no exchange between lanes.
#pragma once

#include "common/channel_pool.h"
#include "cpu/simd.h"
#include "cpu/spectral_align.h"

namespace skd {
namespace SKD_ISA {
namespace {

template <class A>
constexpr int kLanes = 64 / int(sizeof(A));
template <class A>
constexpr int kVectors = kLanes<A> / kWidth<A>;

// Whole rows of one image, and kLanes channels of the pooled width of which the first `lanes` exist.
struct Block {
  int64_t image, channel, lanes, row, rows;
};

// What a map's strides allow: neighbouring channels adjacent (token maps, NHWC), whole planes contiguous (NCHW), neither.
enum class Order { channels, planes, any };

inline Order order_of(const Map& map) {
  const int64_t *n = map.shape, *s = map.stride;
  if (s[1] == 1 && n[1] >= 8) return Order::channels;
  const bool rows_contiguous = n[3] == 1 || s[3] == 1;
  const bool plane_contiguous = n[2] == 1 || s[2] == n[3];
  if (rows_contiguous && plane_contiguous) return Order::planes;
  return n[1] == 1 || s[1] == 1 ? Order::channels : Order::any;
}

template <class T>
inline T* at(const Map& map, int64_t image, int64_t channel, int64_t row) {
  return reinterpret_cast<T*>(map.data) + image * map.stride[0] + channel * map.stride[1] + row * map.stride[2];
}

// One vector of pooled channels out of kRatio times as many adjacent numbers.
template <class A, class T, int kRatio>
struct Pooled {
  static inline Vector<A> load(const T* p) {
    constexpr int half = kWidth<A> * kRatio / 2;
    return add_pairs<A>(Pooled<A, T, kRatio / 2>::load(p), Pooled<A, T, kRatio / 2>::load(p + half));
  }
};
template <class A, class T>
struct Pooled<A, T, 1> {
  static inline Vector<A> load(const T* p) { return Access<A, T>::load(p); }
};

// --- Loading: the average over each lane's channel window -----------------------------------------------------------

template <class A, class T, int kRatio>
inline void load_adjacent_channels(const Map& map, const Block& block, A* tile) {
  const A scale = A(1) / kRatio;
  for (int64_t h = 0; h < block.rows; ++h) {
    const T* p = at<T>(map, block.image, block.channel * kRatio, block.row + h);
    for (int64_t w = 0; w < map.shape[3]; ++w, p += map.stride[3], tile += kLanes<A>) {
      for (int j = 0; j < kVectors<A>; ++j) {
        Access<A, A>::store(tile + j * kWidth<A>, Pooled<A, T, kRatio>::load(p + j * kWidth<A> * kRatio) * scale);
      }
    }
  }
}

// kWidth planes at a time: added up over their windows along the positions, then transposed.
template <class A, class T>
inline void load_planes(const Map& map, int64_t width, const Block& block, A* tile) {
  constexpr int n = kWidth<A>;
  const int64_t positions = block.rows * map.shape[3];
  for (int j = 0; j < kVectors<A>; ++j) {
    const T* plane[n];
    int64_t count[n];
    A scale[n];
    for (int i = 0; i < n; ++i) {
      // A lane that does not exist repeats the last one that does; its numbers are cleared below.
      const int64_t lane = j * n + i < block.lanes ? j * n + i : block.lanes - 1;
      const ChannelWindow window = channel_window(block.channel + lane, map.shape[1], width);
      plane[i] = at<T>(map, block.image, window.begin, block.row);
      count[i] = window.end - window.begin;
      scale[i] = j * n + i < block.lanes ? A(1) / A(count[i]) : A(0);
    }
    if (positions >= n) {
      for (int64_t p = 0;;) {
        Vector<A> rows[n];
        for (int i = 0; i < n; ++i) {
          const T* source = plane[i] + p;
          Vector<A> sum = Access<A, T>::load(source);
          for (int64_t c = 1; c < count[i]; ++c) sum += Access<A, T>::load(source += map.stride[1]);
          rows[i] = sum * scale[i];
        }
        transpose<A>(rows);
        for (int i = 0; i < n; ++i) Access<A, A>::store(tile + (p + i) * kLanes<A> + j * n, rows[i]);
        if (p + n == positions) break;
        p = p + 2 * n <= positions ? p + n : positions - n;  // the last block overlaps the one before
      }
    } else {
      for (int64_t p = 0; p < positions; ++p) {
        for (int i = 0; i < n; ++i) {
          A sum = 0;
          for (int64_t c = 0; c < count[i]; ++c) sum += A(to_float(plane[i][p + c * map.stride[1]]));
          tile[p * kLanes<A> + j * n + i] = sum * scale[i];
        }
      }
    }
    for (int i = 0; i < n; ++i) {
      if (scale[i] != 0) continue;
      for (int64_t p = 0; p < positions; ++p) tile[p * kLanes<A> + j * n + i] = 0;  // also where 0 * inf was NaN
    }
  }
}

template <class A, class T>
inline void load_any(const Map& map, int64_t width, const Block& block, A* tile) {
  const int64_t columns = map.shape[3];
  for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
    if (lane >= block.lanes) {
      for (int64_t p = 0; p < block.rows * columns; ++p) tile[p * kLanes<A> + lane] = 0;
      continue;
    }
    const ChannelWindow window = channel_window(block.channel + lane, map.shape[1], width);
    const A scale = A(1) / A(window.end - window.begin);
    for (int64_t h = 0; h < block.rows; ++h) {
      for (int64_t w = 0; w < columns; ++w) {
        const T* p = at<T>(map, block.image, window.begin, block.row + h) + w * map.stride[3];
        A sum = 0;
        for (int64_t c = window.begin; c < window.end; ++c, p += map.stride[1]) sum += A(to_float(*p));
        tile[(h * columns + w) * kLanes<A> + lane] = sum * scale;
      }
    }
  }
}

template <class A, class T>
inline void load_tile(const Map& map, int64_t width, const Block& block, A* tile) {
  const Order order = order_of(map);
  if (order == Order::planes) return load_planes<A, T>(map, width, block, tile);
  if (order == Order::channels && block.lanes == kLanes<A>) {
    if (map.shape[1] == width) return load_adjacent_channels<A, T, 1>(map, block, tile);
    if (map.shape[1] == 2 * width) return load_adjacent_channels<A, T, 2>(map, block, tile);
    if (map.shape[1] == 4 * width) return load_adjacent_channels<A, T, 4>(map, block, tile);
  }
  load_any<A, T>(map, width, block, tile);
}

// --- Storing: a gradient of the pooled width into a map of that width ------------------------------------------------

template <class A, class T>
inline void store_planes(const Map& map, const Block& block, const A* tile) {
  constexpr int n = kWidth<A>;
  const int64_t positions = block.rows * map.shape[3];
  for (int64_t first = 0; first < block.lanes; first += n) {
    T* plane = at<T>(map, block.image, block.channel + first, block.row);
    const int64_t lanes = block.lanes - first < n ? block.lanes - first : n;
    if (positions >= n) {
      for (int64_t p = 0;;) {
        Vector<A> rows[n];
        for (int i = 0; i < n; ++i) rows[i] = Access<A, A>::load(tile + (p + i) * kLanes<A> + first);
        transpose<A>(rows);
        if (lanes == n) {
          for (int i = 0; i < n; ++i) Access<A, T>::store(plane + i * map.stride[1] + p, rows[i]);
        } else {
          for (int i = 0; i < lanes; ++i) Access<A, T>::store(plane + i * map.stride[1] + p, rows[i]);
        }
        if (p + n == positions) break;
        p = p + 2 * n <= positions ? p + n : positions - n;
      }
    } else {
      for (int64_t i = 0; i < lanes; ++i) {
        for (int64_t p = 0; p < positions; ++p) {
          from_float(tile[p * kLanes<A> + first + i], plane[i * map.stride[1] + p]);
        }
      }
    }
  }
}

template <class A, class T>
inline void store_any(const Map& map, const Block& block, const A* tile) {
  for (int64_t h = 0; h < block.rows; ++h) {
    T* row = at<T>(map, block.image, block.channel, block.row + h);
    for (int64_t w = 0; w < map.shape[3]; ++w, tile += kLanes<A>) {
      T* p = row + w * map.stride[3];
      for (int64_t lane = 0; lane < block.lanes; ++lane) from_float(tile[lane], p[lane * map.stride[1]]);
    }
  }
}

template <class A, class T>
inline void store_tile(const Map& map, const Block& block, const A* tile) {
  if (order_of(map) == Order::planes) return store_planes<A, T>(map, block, tile);
  store_any<A, T>(map, block, tile);
}

// The adjoint of pooling: every channel of `map` gets the mean's share of each window it is in. `tiles` holds all
// pooled channels of the block's rows, kLanes at a time, `tile_size` numbers apart.
template <class A, class T>
inline void store_unpooled(const Map& map, int64_t width, const Block& block, const A* tiles, int64_t tile_size) {
  const int64_t columns = map.shape[3];
  for (int64_t channel = 0; channel < map.shape[1]; ++channel) {
    const ChannelWindow windows = windows_with_channel(channel, map.shape[1], width);
    for (int64_t h = 0; h < block.rows; ++h) {
      T* row = at<T>(map, block.image, channel, block.row + h);
      for (int64_t w = 0; w < columns; ++w) {
        A sum = 0;
        for (int64_t i = windows.begin; i < windows.end; ++i) {
          const ChannelWindow window = channel_window(i, map.shape[1], width);
          sum += tiles[i / kLanes<A> * tile_size + (h * columns + w) * kLanes<A> + i % kLanes<A>] /
                 A(window.end - window.begin);
        }
        from_float(sum, row[w * map.stride[3]]);
      }
    }
  }
}

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd

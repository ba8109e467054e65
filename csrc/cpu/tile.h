// Reading maps of any memory order into tiles, and writing gradients back.
//
// A tile holds some positions of some channels, averaged to the pooled width, a lane for each channel; lanes are padded
// to whole 64-byte lines with zeros.
#pragma once

#include "common/channel_pool.h"
#include "cpu/simd.h"
#include "cpu/spectral_align.h"

namespace skd {
namespace SKD_ISA {
namespace {

template <class A>
constexpr int kLanes = 64 / int(sizeof(A));

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class A>
inline int64_t padded(int64_t n) {
  return divide_up(n, kLanes<A>) * kLanes<A>;
}

// Some pooled channels of some whole rows of one image.
struct Block {
  int64_t image, channel, channels, row, rows;
};

// Where a tile's vectors of lanes are. Side by side, [positions][lanes], they are what a loop over positions wants that
// takes all lanes with it; apart, [vectors][positions], what takes one vector through many steps.
template <class A>
struct TileShape {
  int64_t lanes;
  int64_t position, vector;  // numbers from one to the next

  static TileShape side_by_side(int64_t lanes) { return {lanes, lanes, kWidth<A>}; }
  static TileShape apart(int64_t lanes, int64_t positions) { return {lanes, kWidth<A>, positions * kWidth<A>}; }
  int64_t lane(int64_t c) const { return c / kWidth<A> * vector + c % kWidth<A>; }
};

// What a map's strides allow: neighbouring channels adjacent (token maps, NHWC), whole planes contiguous (NCHW),
// neither.
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

#define SKD_FOR_DTYPE(dtype, T, ...) \
  switch (dtype) {                   \
    case DType::float32: {           \
      using T = float;               \
      __VA_ARGS__                    \
    } break;                         \
    case DType::float64: {           \
      using T = double;              \
      __VA_ARGS__                    \
    } break;                         \
    case DType::bfloat16: {          \
      using T = bfloat16;            \
      __VA_ARGS__                    \
    } break;                         \
    case DType::float16: {           \
      using T = float16;             \
      __VA_ARGS__                    \
    } break;                         \
  }

// Calls visit(p) for vectors of n at p that cover [0, positions), the last one shifted back to end there. False if they
// are fewer than one vector.
template <int n, class Visit>
inline bool for_each_vector(int64_t positions, Visit visit) {
  if (positions < n) return false;
  int64_t p = 0;
  for (; p + n <= positions; p += n) visit(p);
  if (p < positions) visit(positions - n);
  return true;
}

// --- Pooling ---

// One vector of pooled channels: the sums of kRatio adjacent numbers each.
template <class A, class T, int kRatio>
struct AdjacentSums {
  static inline Vector<A> load(const T* p) {
    constexpr int half = kWidth<A> * kRatio / 2;
    return add_pairs<A>(AdjacentSums<A, T, kRatio / 2>::load(p), AdjacentSums<A, T, kRatio / 2>::load(p + half));
  }
};
template <class A, class T>
struct AdjacentSums<A, T, 1> {
  static inline Vector<A> load(const T* p) { return Access<A, T>::load(p); }
};

// One vector of positions: the sum of kCount planes `stride` apart; kCount 0 is any number.
template <class V, class T, int kCount>
inline V add_planes(const T* p, int64_t stride, int64_t count) {
  V sum = VectorAccess<V, T>::load(p);
  if (kCount > 0) count = kCount;
  for (int64_t c = 1; c < count; ++c) sum += VectorAccess<V, T>::load(p + c * stride);
  return sum;
}

template <class A, class T>
inline A add_planes_at(const T* p, int64_t stride, int64_t count) {
  A sum = A(to_float(*p));
  for (int64_t c = 1; c < count; ++c) sum += A(to_float(p[c * stride]));
  return sum;
}

// --- Loading a tile ---

// `channels` of the block are a multiple of a vector.
template <class A, class T, int kRatio>
inline void load_adjacent_channels(const Map& map, const Block& block, A* tile, TileShape<A> shape) {
  const A scale = A(1) / kRatio;
  for (int64_t h = 0; h < block.rows; ++h) {
    const T* p = at<T>(map, block.image, block.channel * kRatio, block.row + h);
    for (int64_t w = 0; w < map.shape[3]; ++w, p += map.stride[3], tile += shape.position) {
      A* vector = tile;
      for (int64_t c = 0; c < block.channels; c += kWidth<A>, vector += shape.vector) {
        const Vector<A> sum = AdjacentSums<A, T, kRatio>::load(p + c * kRatio);
        Access<A, A>::store(vector, kRatio == 1 ? sum : sum * scale);
      }
    }
  }
}

// Some channels at a time: averaged along the positions, then transposed.
template <class A, class T, int kCount>
inline void load_planes(const Map& map, int64_t width, const Block& block, A* tile, TileShape<A> shape) {
  constexpr int n = kPart<A>;
  const int64_t positions = block.rows * map.shape[3], stride = map.stride[1];
  for (int64_t first = 0; first < block.channels; first += n) {
    A* const lanes = tile + shape.lane(first);
    const T* plane[n];
    int64_t count[n];
    A scale[n];
    for (int i = 0; i < n; ++i) {
      // A lane that does not exist repeats the last one that does; its numbers are cleared below.
      const int64_t channel = block.channel + min64(first + i, block.channels - 1);
      const ChannelWindow window = channel_window(channel, map.shape[1], width);
      plane[i] = at<T>(map, block.image, window.begin, block.row);
      count[i] = window.end - window.begin;
      scale[i] = A(1) / A(count[i]);
    }
    const int64_t ahead = n * kCount * stride;  // where the next channels lie, if windows are equally long
    const bool whole = for_each_vector<n>(positions, [&](int64_t p) {
      Part<A> rows[n];
      for (int i = 0; i < n; ++i) {
        for (int c = 0; c < kCount; ++c) __builtin_prefetch(plane[i] + p + c * stride + ahead);
        rows[i] = add_planes<Part<A>, T, kCount>(plane[i] + p, stride, count[i]);
        if (kCount != 1) rows[i] *= scale[i];
      }
      transpose(rows);
      for (int i = 0; i < n; ++i) VectorAccess<Part<A>, A>::store(lanes + (p + i) * shape.position, rows[i]);
    });
    for (int i = 0; i < n; ++i) {
      A* lane = lanes + i;
      if (first + i >= block.channels) {
        for (int64_t p = 0; p < positions; ++p) lane[p * shape.position] = 0;
      } else if (!whole) {
        for (int64_t p = 0; p < positions; ++p) {
          lane[p * shape.position] = add_planes_at<A, T>(plane[i] + p, stride, count[i]) * scale[i];
        }
      }
    }
  }
}

template <class A, class T>
inline void load_any(const Map& map, int64_t width, const Block& block, A* tile, TileShape<A> shape) {
  const int64_t columns = map.shape[3];
  for (int64_t h = 0; h < block.rows; ++h) {
    for (int64_t w = 0; w < columns; ++w, tile += shape.position) {
      const T* position = at<T>(map, block.image, 0, block.row + h) + w * map.stride[3];
      for (int64_t c = 0; c < block.channels; ++c) {
        const ChannelWindow window = channel_window(block.channel + c, map.shape[1], width);
        const int64_t count = window.end - window.begin;
        tile[shape.lane(c)] =
            add_planes_at<A, T>(position + window.begin * map.stride[1], map.stride[1], count) * (A(1) / A(count));
      }
    }
  }
}

template <class A, class T>
inline void load_tile_from(const Map& map, int64_t width, const Block& block, A* tile, TileShape<A> shape) {
  const Order order = order_of(map);
  const int64_t positions = block.rows * map.shape[3];
  for (int64_t c = block.channels; c < shape.lanes; ++c) {
    for (int64_t p = 0; p < positions; ++p) tile[p * shape.position + shape.lane(c)] = 0;
  }
  if (order == Order::planes) {
    if (map.shape[1] == width) return load_planes<A, T, 1>(map, width, block, tile, shape);
    if (map.shape[1] == 2 * width) return load_planes<A, T, 2>(map, width, block, tile, shape);
    return load_planes<A, T, 0>(map, width, block, tile, shape);
  }
  if (order == Order::channels && block.channels % kWidth<A> == 0) {
    if (map.shape[1] == width) return load_adjacent_channels<A, T, 1>(map, block, tile, shape);
    if (map.shape[1] == 2 * width) return load_adjacent_channels<A, T, 2>(map, block, tile, shape);
    if (map.shape[1] == 4 * width) return load_adjacent_channels<A, T, 4>(map, block, tile, shape);
  }
  load_any<A, T>(map, width, block, tile, shape);
}

// The block of `map`, pooled to `width` channels, as a tile.
template <class A>
void load_tile(const Map& map, int64_t width, const Block& block, A* tile, TileShape<A> shape) {
  SKD_FOR_DTYPE(map.dtype, T, load_tile_from<A, T>(map, width, block, tile, shape);)
}

// --- Storing a gradient ---

// A tile of the pooled width into a map of that width.
template <class A, class T>
inline void store_tile(const Map& map, const Block& block, const A* tile, TileShape<A> shape) {
  for (int64_t h = 0; h < block.rows; ++h) {
    T* p = at<T>(map, block.image, block.channel, block.row + h);
    for (int64_t w = 0; w < map.shape[3]; ++w, tile += shape.position, p += map.stride[3]) {
      for (int64_t c = 0; c < block.channels; ++c) from_float(tile[shape.lane(c)], p[c * map.stride[1]]);
    }
  }
}

// The same into contiguous planes.
template <class A, class T>
inline void store_planes(const Map& map, const Block& block, const A* tile, TileShape<A> shape) {
  constexpr int n = kPart<A>;
  const int64_t positions = block.rows * map.shape[3];
  for (int64_t first = 0; first < block.channels; first += n) {
    const A* const lanes = tile + shape.lane(first);
    const int count = int(min64(n, block.channels - first));
    T* const out = at<T>(map, block.image, block.channel + first, block.row);
#if defined(__AVX2__)
    if constexpr (std::is_same<A, float>::value && std::is_same<T, float>::value) {
      const auto store = [&](int64_t p) {
        store_transposed_fours(lanes + p * shape.position, shape.position, out + p, map.stride[1]);
      };
      if (count == n && for_each_vector<4>(positions, store)) continue;
    }
#endif
    const bool whole = for_each_vector<n>(positions, [&](int64_t p) {
      Part<A> rows[n];
      for (int i = 0; i < n; ++i) rows[i] = VectorAccess<Part<A>, A>::load(lanes + (p + i) * shape.position);
      transpose(rows);
      for (int i = 0; i < count; ++i) VectorAccess<Part<A>, T>::store(out + i * map.stride[1] + p, rows[i]);
    });
    for (int64_t p = 0; !whole && p < positions; ++p) {
      for (int i = 0; i < count; ++i) from_float(lanes[p * shape.position + i], out[i * map.stride[1] + p]);
    }
  }
}

// The adjoint of pooling: every channel of `map` gets its share of the mean of each window it is in. The tile holds all
// pooled channels.
template <class A, class T>
inline void store_unpooled(const Map& map, const Block& block, const A* tile, TileShape<A> shape) {
  const int64_t columns = map.shape[3], width = block.channels;
  for (int64_t channel = 0; channel < map.shape[1]; ++channel) {
    const ChannelWindow windows = windows_with_channel(channel, map.shape[1], width);
    for (int64_t h = 0; h < block.rows; ++h) {
      T* row = at<T>(map, block.image, channel, block.row + h);
      const A* position = tile + h * columns * shape.position;
      for (int64_t w = 0; w < columns; ++w, position += shape.position) {
        A sum = 0;
        for (int64_t i = windows.begin; i < windows.end; ++i) {
          const ChannelWindow window = channel_window(i, map.shape[1], width);
          sum += position[shape.lane(i)] / A(window.end - window.begin);
        }
        from_float(sum, row[w * map.stride[3]]);
      }
    }
  }
}

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd

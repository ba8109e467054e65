// Single numbers of a map of any dtype and strides.
#pragma once

#include "common/channel_pool.h"
#include "common/number_formats.h"
#include "cuda/align_plan.h"

namespace skd {

__device__ inline float number_at(const DeviceMap& map, int64_t at) {
  switch (map.dtype) {
    case DType::bfloat16: return to_float(reinterpret_cast<const bfloat16*>(map.data)[at]);
    case DType::float16: return to_float(reinterpret_cast<const float16*>(map.data)[at]);
    default: return reinterpret_cast<const float*>(map.data)[at];
  }
}

// The mean of a window of channels at one position.
__device__ inline float pooled_at(const DeviceMap& map, int64_t position, int channels, int width, int pooled) {
  const ChannelWindow window = channel_window(pooled, channels, width);
  float sum = 0;
  for (int64_t c = window.begin; c < window.end; ++c) sum += number_at(map, position + c * map.stride[1]);
  return sum * (1.0f / float(window.end - window.begin));
}

// A gradient has the student's dtype, or is float32.
__device__ inline void store_gradient(const DeviceMap& out, int64_t at, float g) {
  switch (out.dtype) {
    case DType::bfloat16: return from_float(g, reinterpret_cast<bfloat16*>(out.data)[at]);
    case DType::float16: return from_float(g, reinterpret_cast<float16*>(out.data)[at]);
    default: reinterpret_cast<float*>(out.data)[at] = g;
  }
}

}  // namespace skd

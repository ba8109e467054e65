// The channel windows of adaptive average pooling, for host and device code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SKD_HD __host__ __device__
#else
#define SKD_HD
#endif

namespace skd {

// Channels [begin, end) that are averaged into one of `width` pooled channels, out of `channels`.
struct ChannelWindow {
  int64_t begin, end;
};

SKD_HD static inline ChannelWindow channel_window(int64_t pooled, int64_t channels, int64_t width) {
  return {pooled * channels / width, ((pooled + 1) * channels + width - 1) / width};
}

// Pooled channels [begin, end) whose windows hold `channel`: the adjoint's view of the same windows.
SKD_HD static inline ChannelWindow windows_with_channel(int64_t channel, int64_t channels, int64_t width) {
  return {channel * width / channels, ((channel + 1) * width + channels - 1) / channels};
}

}  // namespace skd

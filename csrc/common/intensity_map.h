// The arguments of spectral_intensity, as they cross from Python.
#pragma once

#include "common/align_layer.h"

namespace skd {

enum class Axis : int { channel, space };

struct IntensityArguments {
  Map map;
  Axis axis;
  double scale;  // of every magnitude
  // [B, C//2+1] or [B, H, W//2+1], without B where images are averaged; float32, or float64 for a float64 map.
  char* out;

  // Bins of an image, and the transforms that are averaged for them.
  int64_t bins() const { return axis == Axis::channel ? map.shape[1] / 2 + 1 : map.shape[2] * (map.shape[3] / 2 + 1); }
  int64_t transforms() const { return axis == Axis::channel ? map.shape[2] * map.shape[3] : map.shape[1]; }
};

}  // namespace skd

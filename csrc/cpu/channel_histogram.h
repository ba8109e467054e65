// Histograms of the channel values of every position of a map.
#pragma once

#include <cstdint>

#include "common/align_layer.h"

namespace skd {

struct HistogramArguments {
  Map map;
  const double *offset, *scale;  // of every image: a value x is in bin offset + scale x, rounded down, or the nearest
  int64_t bins;
};

// Adds to holding[n], n = 0 .. C, how many bins of all positions hold n of the position's C values.
void count_channels(const HistogramArguments& x, int threads, int64_t* holding);

}  // namespace skd

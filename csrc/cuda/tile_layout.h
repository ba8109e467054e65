// How a part of a map lies in memory and in shared memory: what the plans of all kernels share.
#pragma once

#include <cstdint>

#include "cuda/align_plan.h"

namespace skd {
namespace layout {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// At most `most` at a time, in parts of about one size that are multiples of `unit` if there is room for one.
int64_t evenly(int64_t n, int64_t most, int64_t unit);

// A map for the device, which is not in a tile yet.
DeviceMap device_map(const Map& map);

bool planes_adjoin(const Map& map);

// Whether stretches that follow each other begin at one remainder of 16 bytes, as 16-byte pieces need.
bool stretches_alike(const Map& map, Order order);

// The first pitch of 16-byte pieces, in shared memory, that leaves `remainder` modulo 128: in that many bytes' banks
// the next stretch begins.
int64_t pitch_of(int64_t length, int64_t remainder);

// Sets what `part` needs to fetch `count` stretches of `length` bytes; returns the bytes that they take in shared
// memory.
int64_t lay_out_stretches(DeviceMap& part, int64_t count, int64_t length, int64_t pitch);

int as_int(int64_t n);

}  // namespace layout
}  // namespace skd

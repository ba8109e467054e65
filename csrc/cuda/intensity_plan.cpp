#include <algorithm>

#include "cuda/launch.h"
#include "cuda/spectral_intensity.h"
#include "cuda/tile_layout.h"

namespace skd {
namespace {

using namespace layout;

constexpr int64_t kUsualBytes = 40 << 10;          // of shared memory: several blocks to a multiprocessor
constexpr int64_t kSlotBytes = int64_t(64) << 20;  // of global work memory for all blocks
constexpr int kTilesPerBlock = 4;

bool fetched_in_pieces(const DeviceMap& map, const Map& x) {
  if (map.order == Order::any) return false;
  if (map.order == Order::planes && x.shape[1] == 1) return true;
  return stretches_alike(x, map.order);
}

// The buffers of a tile of so many positions; a fetched tile lies in the first.
int64_t try_tile(ChannelIntensity& plan, int64_t positions) {
  plan.positions = int(positions);
  const int64_t bins = positions * plan.pitch * 8;
  int64_t raw = 0;
  if (plan.in_pieces) {
    const int64_t size = bytes_of(plan.map.dtype);
    if (plan.map.order == Order::planes) {
      raw = lay_out_stretches(plan.map, plan.channels, positions * size, round_up(positions * size, 16));
    } else {
      raw = lay_out_stretches(plan.map, positions, plan.channels * size, pitch_of(plan.channels * size, 16));
    }
  }
  plan.buffer = round_up(std::max(bins, raw), 16);
  return 2 * plan.buffer + plan.twiddles * 8;
}

}  // namespace

ChannelIntensity plan_channel_intensity(const Map& x, float* out, double scale) {
  ChannelIntensity plan{};
  plan.map = device_map(x);
  plan.channels = as_int(x.shape[1]);
  plan.columns = as_int(x.shape[3]);
  plan.images = x.shape[0];
  plan.all_positions = x.shape[2] * x.shape[3];
  plan.bins = plan.channels / 2 + 1;
  plan.in_pieces = fetched_in_pieces(plan.map, x);
  const FftTables<float> tables(plan.channels, FftKind::real);
  plan.plan = tables.plan();
  plan.plan.table = nullptr;
  plan.twiddles = int(tables.size());
  plan.pitch = (plan.channels % 2 ? plan.channels : plan.bins) | 1;

  const int64_t head = kIntensityHead;
  const auto most_within = [&](int64_t bytes) {
    int64_t positions = std::min(plan.all_positions, bytes / (plan.pitch * 16) + 1);
    while (positions > 0 && head + try_tile(plan, positions) > bytes) --positions;
    return positions;
  };
  // 32 bytes of each plane are what memory moves at once.
  const bool by_position = plan.map.order == Order::channels;
  const int64_t wanted = std::min<int64_t>(plan.all_positions, by_position ? 1 : 32 / bytes_of(x.dtype));
  int64_t positions = most_within(kUsualBytes);
  if (positions < wanted) positions = std::min(wanted, most_within(kMostSharedBytes));
  if (positions == 0 && plan.in_pieces) {  // pieces of few positions are padded
    plan.in_pieces = false;
    positions = std::min(wanted, most_within(kMostSharedBytes));
  }
  if (positions > 0) {
    positions = evenly(plan.all_positions, positions, by_position ? 1 : wanted);
    plan.shared_bytes = int(head + try_tile(plan, positions));
  } else {
    plan.in_pieces = false;
    plan.slot = round_up(try_tile(plan, 1), 256);
    plan.shared_bytes = int(head);
  }
  plan.tiles = divide_up(plan.all_positions, plan.positions);
  plan.blocks = int(divide_up(plan.tiles, kTilesPerBlock));
  plan.launched = plan.images * plan.blocks;
  const int64_t most = plan.slot > 0 ? std::max<int64_t>(1, kSlotBytes / plan.slot) : (int64_t(1) << 31) - 1;
  plan.launched = std::min(plan.launched, most);
  plan.scale = scale / double(plan.all_positions);
  plan.out = out;
  return plan;
}

void ChannelIntensity::place(double* workspace) {
  sums = reinterpret_cast<float*>(workspace);
  slots = reinterpret_cast<char*>(workspace + (images * blocks * bins + 1) / 2);
}

}  // namespace skd

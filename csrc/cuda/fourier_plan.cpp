#include "cuda/fourier_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "cuda/tile_layout.h"

namespace skd {
namespace {

using namespace layout;

constexpr int64_t kUsualBytes = 40 << 10;           // of shared memory: several blocks to a multiprocessor
constexpr int64_t kMostBytes = 96 << 10;            // what a block may have on every architecture since sm_80
constexpr int64_t kMostBlocks = 2048;               // of a layer; they go on to further tiles
constexpr int64_t kSumsBytes = 1 << 20;             // of magnitudes, for all layers of a call
constexpr int64_t kSlotBytes = int64_t(128) << 20;  // of global work memory for all blocks, if a slot is no larger

// The longest length of the kernel that has codelets for this one, or 0.
int kernel_of_length(int n) {
  switch (n) {
    case 4:
    case 7:
    case 8:
    case 14:
    case 16: return 16;
    case 28:
    case 32: return 32;
    case 56: return 56;
    default: return 0;
  }
}

bool are_planes(const DeviceMap& map) { return map.order == Order::planes; }

// Threads of a warp whose rows follow each other in memory would read from few banks.
bool rows_share_banks(const Map& map) { return map.shape[3] * bytes_of(map.dtype) % 32 == 0; }

// A tile's part of one map; the bytes that it takes in shared memory, or -1 where it has no such pieces.
int64_t lay_out(DeviceMap& part, const Map& map, int64_t channels, bool& planes_first) {
  const int64_t size = bytes_of(map.dtype), positions = map.shape[2] * map.shape[3], plane = positions * size;
  const bool alike = stretches_alike(map, part.order);
  if (part.order == Order::channels) {
    planes_first = true;
    const int64_t pitch = round_up(channels * size, 16);
    return alike || positions == 1 ? lay_out_stretches(part, positions, channels * size, pitch) : -1;
  }
  // Apart, eight planes begin in different banks; otherwise a tile is one stretch.
  planes_first = alike && rows_share_banks(map) && channels >= 4;
  if (planes_first) return lay_out_stretches(part, channels, plane, pitch_of(plane, 16));
  if (channels == 1 || planes_adjoin(map)) return lay_out_stretches(part, 1, channels * plane, 0);
  return alike ? lay_out_stretches(part, channels, plane, round_up(plane, 16)) : -1;
}

// Shared memory of a tile of so many pooled channels, or -1.
int64_t try_tile(FourierLayer& layer, const FourierArguments& from, int64_t channels) {
  DeviceLayer& maps = layer.maps;
  maps.channels = int(channels);
  int64_t at = kFourierScratch;
  layer.largest = int(at);
  at = round_up(at + channels * int64_t(sizeof(float)), 16);
  maps.student.offset = int(at);
  const int64_t student = lay_out(maps.student, from.student, channels, layer.planes_first[0]);
  if (student < 0) return -1;
  at += student;
  layer.planes_first[1] = layer.planes_first[0];
  if (layer.with_teacher) {
    const int64_t windows = divide_up(channels * maps.teacher_channels, maps.width);
    const int64_t most = std::min<int64_t>(maps.teacher_channels, windows + (maps.ratio == 0 ? 2 : 0));
    maps.teacher.offset = int(at);
    const int64_t teacher = lay_out(maps.teacher, from.teacher, most, layer.planes_first[1]);
    if (teacher < 0) return -1;
    at += teacher;
  }
  layer.work = int(at);
  return at + channels * layer.arrays * layer.plane_pitch * int64_t(sizeof(Bin));
}

// Chooses the size of the tiles; the shared memory of one, or -1 if the layer has to take the general path.
int64_t plan_tiles(FourierLayer& layer, const FourierArguments& from) {
  DeviceLayer& maps = layer.maps;
  const int longest = kernel_of_length(maps.height);
  if (longest == 0 || kernel_of_length(maps.columns) != longest) return -1;
  if (maps.student_channels > maps.width || maps.student.order == Order::any) return -1;
  if (layer.with_teacher && maps.teacher.order == Order::any) return -1;
  // An odd pitch, and planes that follow each other as their rows do: no two threads of half a warp meet in a bank.
  layer.row_pitch = layer.row_bins | 1;
  layer.plane_pitch = maps.height * layer.row_pitch;
  while (layer.plane_pitch % 16 != layer.row_pitch % 16) ++layer.plane_pitch;
  const auto most_within = [&](int64_t bytes) {
    int64_t channels = std::min<int64_t>(maps.width, bytes / (layer.plane_pitch * layer.arrays * int64_t(sizeof(Bin))));
    for (; channels > 0; --channels) {
      const int64_t shared = try_tile(layer, from, channels);
      if (shared >= 0 && shared <= bytes) break;
    }
    return channels;
  };
  int64_t channels = most_within(kUsualBytes);
  const bool tokens = !are_planes(maps.student) || (layer.with_teacher && !are_planes(maps.teacher));
  // Stretches of channels of 32 bytes are what memory moves at once.
  const int64_t wanted = std::min<int64_t>(maps.width, tokens ? 32 / bytes_of(from.student.dtype) : 1);
  if (channels < wanted) channels = std::min(wanted, most_within(kMostBytes));
  if (channels < 1) return -1;
  const int64_t piece = tokens ? 16 / bytes_of(from.student.dtype) : 1;
  const int64_t shared = try_tile(layer, from, evenly(maps.width, channels, piece));
  return shared <= kMostBytes ? shared : -1;
}

FourierLayer describe(const FourierArguments& from, double norm) {
  FourierLayer layer{};
  DeviceLayer& maps = layer.maps;
  layer.with_teacher = from.teacher.data != nullptr || from.teacher.shape[1] > 0;
  maps.student = device_map(from.student);
  maps.teacher = device_map(from.teacher);
  maps.gradient = device_map(from.gradient);
  maps.loss_scale = from.loss_scale;
  maps.gradient_scale = float(from.gradient_scale);
  maps.batch = as_int(from.student.shape[0]);
  maps.student_channels = as_int(from.student.shape[1]);
  maps.teacher_channels = layer.with_teacher ? as_int(from.teacher.shape[1]) : maps.student_channels;
  maps.width = std::min(maps.student_channels, maps.teacher_channels);
  maps.height = as_int(from.student.shape[2]);
  maps.columns = as_int(from.student.shape[3]);
  maps.rows = maps.height;
  maps.ratio = maps.teacher_channels % maps.width ? 0 : maps.teacher_channels / maps.width;
  layer.bands = reinterpret_cast<const float*>(from.bands);
  layer.spectra = reinterpret_cast<float*>(from.spectra);
  layer.compare = from.compare;
  layer.norm = float(norm);
  layer.focal = float(from.focal);
  layer.inner_weight = float(from.inner_weight);
  layer.arrays = layer.with_teacher && (from.compare != Compare::complex || from.spectra != nullptr) ? 2 : 1;
  layer.row_bins = maps.columns / 2 + 1;
  return layer;
}

// --- The general path ---

FourierLaunch plan_general(FourierLayer& layer) {
  DeviceLayer& maps = layer.maps;
  FourierLaunch launch{};
  GeneralFourier& general = launch.general;
  const FftTables<float> rows(maps.columns, FftKind::real), columns(maps.height, FftKind::complex);
  general.rows = rows.plan(), general.columns = columns.plan();
  general.rows.table = general.columns.table = nullptr;
  general.row_twiddles = int(rows.size()), general.column_twiddles = int(columns.size());
  layer.row_pitch = maps.columns % 2 ? maps.columns : layer.row_bins | 1;  // room for every number of an odd row
  const int64_t plane = int64_t(maps.height) * layer.row_pitch;
  if (plane > std::numeric_limits<int>::max()) throw std::invalid_argument("a plane of a map exceeds 2^31 - 1 numbers");
  layer.plane_pitch = int(plane);
  // A student's channel in two windows needs the gradient of the plane after the tile's, too.
  const int extra = maps.student_channels % maps.width ? 1 : 0;
  const int64_t twiddles = (rows.size() + columns.size()) * int64_t(sizeof(Bin));
  const auto bytes = [&](int64_t channels) {
    layer.largest = kFourierScratch + 2 * int(sizeof(FftPlan<float>));
    layer.work = int(round_up(layer.largest + (channels + extra) * int64_t(sizeof(float)), 16));
    general.buffer = (channels + extra) * layer.arrays * plane;
    return twiddles + 2 * general.buffer * int64_t(sizeof(Bin));
  };
  maps.channels = maps.width;
  while (maps.channels > 1 && bytes(maps.channels) + layer.work > kUsualBytes) maps.channels = (maps.channels + 1) / 2;
  const int64_t work = bytes(maps.channels);
  launch.shared_bytes = layer.work;
  if (work + layer.work <= kMostBytes) {
    launch.shared_bytes += int(work);
  } else {
    general.slot = round_up(work, 256);
  }
  return launch;
}

// --- Launches ---

void cut(FourierLayer& layer, bool group_per_image, int64_t most_sums) {
  DeviceLayer& maps = layer.maps;
  maps.channel_tiles = int(divide_up(maps.width, maps.channels));
  layer.groups = group_per_image ? maps.batch : 1;
  layer.tiles = group_per_image ? maps.channel_tiles : int64_t(maps.batch) * maps.channel_tiles;
  const int64_t sums = (layer.with_teacher ? 2 : 1) * int64_t(maps.height) * layer.row_bins;
  int64_t blocks = std::min(layer.tiles, kMostBlocks);
  if (group_per_image) {
    // By the image alone, so that its sums do not depend on the batch; a block's are small beside 16 planes.
    blocks = std::min(blocks, std::max<int64_t>(1, maps.width / 16));
  } else if (layer.spectra != nullptr) {
    blocks = std::min(blocks, std::max<int64_t>(1, most_sums / (sums * int64_t(sizeof(float)))));
  }
  layer.blocks = blocks == 0 ? 0 : int(divide_up(layer.tiles, divide_up(layer.tiles, blocks)));
}

int64_t all_blocks(const FourierLayer& layer) { return layer.groups * layer.blocks; }

int64_t all_sums(const FourierLayer& layer) {
  if (layer.spectra == nullptr) return 0;
  return all_blocks(layer) * (layer.with_teacher ? 2 : 1) * layer.maps.height * layer.row_bins;
}

void add(FourierPlan& plan, const FourierArguments& from, double norm, bool group_per_image, int64_t most_sums) {
  FourierLayer layer = describe(from, norm);
  const int64_t shared = plan_tiles(layer, from);
  DeviceMap& gradient = layer.maps.gradient;
  if (shared > 0) {
    if (gradient.data != nullptr && gradient.dtype == layer.maps.student.dtype &&
        gradient.order == layer.maps.student.order) {
      const DeviceMap kept = gradient;
      bool planes_first;
      const bool in_pieces = lay_out(gradient, from.gradient, layer.maps.channels, planes_first) >= 0;
      layer.maps.staged = in_pieces && (gradient.pitch == 0) == (layer.maps.student.pitch == 0);
      if (!layer.maps.staged) gradient = kept;
    }
    cut(layer, group_per_image, most_sums);
    const int longest = kernel_of_length(layer.maps.height);
    const auto fits = [&](const FourierLaunch& launch) {
      return launch.longest == longest && launch.table.layers < kFourierLayers;
    };
    size_t at = size_t(std::find_if(plan.launches.begin(), plan.launches.end(), fits) - plan.launches.begin());
    if (at == plan.launches.size()) {
      plan.launches.emplace_back();
      plan.launches[at].longest = longest;
    }
    FourierLaunch& launch = plan.launches[at];
    layer.first_block = int(launch.blocks);
    launch.blocks += all_blocks(layer);
    launch.shared_bytes = std::max(launch.shared_bytes, int(shared));
    plan.paths.push_back("tile");
    plan.places.emplace_back(int(at), launch.table.layers);
    launch.table.layer[launch.table.layers++] = layer;
  } else {
    FourierLaunch launch = plan_general(layer);
    cut(layer, group_per_image, most_sums);
    launch.blocks = all_blocks(layer);
    if (launch.general.slot > 0) {
      launch.blocks = std::min(launch.blocks, std::max<int64_t>(1, kSlotBytes / launch.general.slot));
    }
    launch.general.layer = layer;
    plan.slots = std::max(plan.slots, launch.blocks * launch.general.slot);
    plan.paths.push_back("general");
    plan.places.emplace_back(int(plan.launches.size()), 0);
    plan.launches.push_back(launch);
  }
  const FourierLaunch& launch = plan.launches[size_t(plan.places.back().first)];
  if (launch.blocks > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("the maps of one call need more than 2^31 - 1 blocks of threads; split the batch");
  }
  plan.shares += all_blocks(layer);
  plan.sums += all_sums(layer);
}

}  // namespace

FourierPlan plan_fourier(const std::vector<FourierArguments>& layers) {
  FourierPlan plan{};
  for (const FourierArguments& from : layers) {
    const double numbers = double(from.student.shape[2]) * double(from.student.shape[3]);
    add(plan, from, 1 / std::sqrt(numbers), false, kSumsBytes / int64_t(layers.size()));
  }
  return plan;
}

FourierPlan plan_space_intensity(const Map& x, float* out, double scale) {
  FourierArguments from{};
  from.student = x;
  from.spectra = reinterpret_cast<char*>(out);
  FourierPlan plan{};
  add(plan, from, scale, true, 0);
  return plan;
}

void FourierPlan::place(double* workspace) {
  double* share = workspace;
  float* sum = reinterpret_cast<float*>(workspace + shares);
  char* const slot = reinterpret_cast<char*>(workspace + shares + (sums + 1) / 2);
  for (FourierLaunch& launch : launches) {
    launch.general.slots = slot;
    const int count = launch.longest == 0 ? 1 : launch.table.layers;
    for (int l = 0; l < count; ++l) {
      FourierLayer& layer = launch.longest == 0 ? launch.general.layer : launch.table.layer[l];
      layer.shares = share;
      layer.sums = sum;
      share += all_blocks(layer);
      sum += all_sums(layer);
    }
  }
}

}  // namespace skd

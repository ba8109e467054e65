#include "cuda/align_plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda/tile_layout.h"

namespace skd {
namespace {

using namespace layout;

// A tile's part of one map: its stretches, and the bytes that it takes in shared memory, or -1 where it cannot be
// fetched in 16-byte pieces.
int64_t lay_out(DeviceMap& part, const Map& map, int64_t channels, const DeviceLayer& layer) {
  const int64_t size = bytes_of(map.dtype), positions = int64_t(layer.rows) * layer.columns;
  int64_t count, length;
  if (part.order == Order::channels) {
    count = positions, length = channels * size;
  } else if (layer.rows == layer.height && planes_adjoin(map)) {
    count = 1, length = channels * positions * size;
  } else {
    count = channels, length = positions * size;
  }
  if (count > 1 && !stretches_alike(map, part.order)) return -1;
  // Threads of a row side by side, and rows of neighbouring channels, meet different banks.
  const int64_t remainder = part.order == Order::channels && layer.lanes == 2 ? 64 : 16;
  return lay_out_stretches(part, count, length, pitch_of(length, remainder));
}

// Shared memory of a tile of the layer's present size, or -1 where a part cannot be fetched in 16-byte pieces.
int64_t try_tile(DeviceLayer& layer, const AlignArguments& from) {
  // A window of overlapping ones may begin one channel early and end one late.
  const int64_t windows = divide_up(int64_t(layer.channels) * layer.teacher_channels, layer.width);
  const int64_t teacher_channels = std::min<int64_t>(layer.teacher_channels, windows + (layer.ratio == 0 ? 2 : 0));
  const int64_t student = lay_out(layer.student, from.student, layer.channels, layer);
  const int64_t teacher = lay_out(layer.teacher, from.teacher, teacher_channels, layer);
  if (student < 0 || teacher < 0) return -1;
  layer.student.offset = 64;  // after what the threads' sums need
  layer.teacher.offset = int(64 + student);
  return 64 + student + teacher;
}

// Chooses the size of the tiles; false if the layer has to take the direct path.
bool plan_tiles(DeviceLayer& layer, const AlignArguments& from) {
  const DeviceMap &s = layer.student, &t = layer.teacher;
  if (layer.student_channels > layer.width || s.order == Order::any || t.order == Order::any) return false;
  const int64_t ratio = divide_up(layer.teacher_channels, layer.width);
  const int64_t bytes = bytes_of(s.dtype) + ratio * bytes_of(t.dtype);
  const bool planes_only = s.order == Order::planes && t.order == Order::planes;
  layer.rows_first = planes_only;
  for (int64_t numbers = kTileBytes / bytes; numbers >= layer.columns; numbers = numbers * 3 / 4) {
    const int64_t row_channels = numbers / layer.columns;  // channels of one row that fit
    const int64_t plane_channels = row_channels / layer.height;
    const bool whole_planes = planes_adjoin(from.student) && planes_adjoin(from.teacher);
    const auto take = [&](int64_t channels, int64_t rows) {
      layer.channels = int(channels), layer.rows = int(rows);
      const int64_t shared = try_tile(layer, from);
      return shared > 0 && shared <= kSharedBytes;
    };
    if (planes_only) {
      if (plane_channels >= 1) {
        if (take(evenly(layer.width, whole_planes ? plane_channels : 1, 1), layer.height)) return true;
        if (take(1, layer.height)) return true;
      } else if (take(1, evenly(layer.height, row_channels, 1))) {
        return true;
      }
      continue;
    }
    // Stretches of channels of 128 bytes or more, whatever rows there is room for then; or whole planes where only
    // these can be fetched.
    const int size = std::min(bytes_of(s.dtype), bytes_of(t.dtype));
    const bool tokens_only = s.order == Order::channels && t.order == Order::channels;
    const int64_t wanted = tokens_only ? row_channels : std::min<int64_t>(row_channels, 128 / size);
    const int64_t channels = evenly(layer.width, wanted, 16);
    if (take(channels, evenly(layer.height, row_channels / channels, 1))) return true;
    if (plane_channels >= 1 && take(evenly(layer.width, plane_channels, 8), layer.height)) return true;
    if (plane_channels < 1 && take(1, evenly(layer.height, row_channels, 1))) return true;
  }
  return false;
}

// Threads that share a row, an even number. Planes have no padding between rows: as many lanes as the largest power of
// two in the width read rows that follow each other from different banks.
int lanes_of(int columns, bool planes) {
  if (planes && columns % 2 == 0) return std::min(32, columns & -columns);
  return columns <= 16 ? 2 : 8;
}

DeviceLayer plan_layer(const AlignArguments& from) {
  DeviceLayer layer{};
  layer.student = device_map(from.student);
  layer.teacher = device_map(from.teacher);
  layer.gradient = device_map(from.gradient);
  layer.loss_scale = from.loss_scale;
  layer.row_weight = float(from.row_weight);
  layer.gradient_scale = float(from.gradient_scale);
  layer.batch = as_int(from.student.shape[0]);
  layer.student_channels = as_int(from.student.shape[1]);
  layer.teacher_channels = as_int(from.teacher.shape[1]);
  layer.width = std::min(layer.student_channels, layer.teacher_channels);
  layer.height = as_int(from.student.shape[2]);
  layer.columns = as_int(from.student.shape[3]);
  layer.ratio = layer.teacher_channels % layer.width ? 0 : layer.teacher_channels / layer.width;
  layer.lanes = lanes_of(layer.columns, layer.student.order == Order::planes && layer.teacher.order == Order::planes);
  if (plan_tiles(layer, from)) {
    layer.path = Path::tile;
    layer.channel_tiles = int(divide_up(layer.width, layer.channels));
    layer.row_tiles = int(divide_up(layer.height, layer.rows));
    DeviceMap& gradient = layer.gradient;
    if (gradient.data != nullptr && gradient.dtype == layer.student.dtype && gradient.order == layer.student.order) {
      const DeviceMap kept = gradient;
      const bool in_pieces = lay_out(gradient, from.gradient, layer.channels, layer) >= 0;
      layer.staged = in_pieces && (gradient.pitch == 0) == (layer.student.pitch == 0);
      if (!layer.staged) gradient = kept;
    }
  } else {
    layer.path = Path::direct;
    layer.lanes = 8;
  }
  return layer;
}

int64_t blocks_of(const DeviceLayer& layer) {
  if (layer.path == Path::tile) return int64_t(layer.batch) * layer.channel_tiles * layer.row_tiles;
  const int64_t rows = int64_t(layer.batch) * layer.student_channels * layer.height;
  return divide_up(rows, kRowsPerGroup * (kThreads / layer.lanes));
}

}  // namespace

std::vector<AlignLaunch> plan_align(const std::vector<AlignArguments>& layers, bool reduce) {
  std::vector<AlignLaunch> launches;
  std::vector<int64_t> blocks;
  for (size_t i = 0; i < layers.size(); ++i) {
    DeviceLayer layer = plan_layer(layers[i]);
    layer.place = int(i);
    const auto fits = [&](const AlignLaunch& launch) {
      const DeviceLayer& first = launch.table.layer[0];
      const bool same_dtypes = first.student.dtype == layer.student.dtype && first.teacher.dtype == layer.teacher.dtype;
      return launch.table.layers < kLayersPerLaunch && first.path == layer.path &&
             (layer.path == Path::direct || same_dtypes);
    };
    const size_t at = size_t(std::find_if(launches.begin(), launches.end(), fits) - launches.begin());
    if (at == launches.size()) {
      launches.push_back(AlignLaunch{{}, 64});
      blocks.push_back(0);
    }
    const int64_t in_layer = blocks_of(layer);
    if (blocks[at] + in_layer > std::numeric_limits<int>::max()) {
      throw std::invalid_argument("the maps of one call need more than 2^31 - 1 blocks of threads; split the batch");
    }
    layer.first_block = int(blocks[at]);
    blocks[at] += in_layer;
    if (layer.path == Path::tile) {
      launches[at].shared_bytes = std::max(launches[at].shared_bytes, int(try_tile(layer, layers[i])));
    }
    DeviceTable& table = launches[at].table;
    table.layer[table.layers++] = layer;
  }
  for (size_t at = 0; at < launches.size(); ++at) {
    DeviceTable& table = launches[at].table;
    table.all_layers = int(layers.size());
    table.blocks = int(std::max<int64_t>(blocks[at], 1));  // an empty call still has losses to write
    table.last = at + 1 == launches.size();
    table.reduce = reduce;
  }
  return launches;
}

}  // namespace skd

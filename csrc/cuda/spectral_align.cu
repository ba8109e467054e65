// The alignment loss and its gradient for all layers of a call in one launch.
//
// The way of a tile: a block fetches its part of both maps into shared memory (16-byte asynchronous copies, in the
// order of the map's own memory, so that no layout is copied), its threads walk the rows there (a row belongs to an
// even number of lanes, each with columns of one parity), leave the gradient in the student's place, and write it out
// as it came in. Global memory is read once and written once; per 16 bytes that is one instruction. What does not lie
// so is read in place (direct path). Blocks add up in double, each writes its share, and the last one adds the shares
// in order.
#include "common/alignment.h"
#include "common/channel_pool.h"
#include "common/number_formats.h"
#include "cuda/launch.h"
#include "cuda/map_numbers.h"
#include "cuda/spectral_align.h"
#include "cuda/stretches.h"

namespace skd {
namespace {

struct Sums {
  double squares = 0, row_squares = 0;
};

// --- Rows ---

// S of the row for the columns of this lane's parity, by the lanes that share the row, an even number. All threads of
// the warp call it; `columns` is 0 for those without a row.
template <class Difference>
__device__ inline float sum_row(int lane, int lanes, int columns, bool odd_width, Difference difference, Sums& sums) {
  float sum = 0;
  for (int first = lane; first < columns; first += lanes * kTermsInFloat) {
    const int end = min(columns, first + lanes * kTermsInFloat);
    float part = 0, squares = 0;
    for (int w = first; w < end; w += lanes) {
      const float d = difference(w);
      part += d;
      squares += d * d;
    }
    sum += part;
    sums.squares += squares;
  }
  for (int offset = 2; offset < lanes; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  // Lane 0 closes the row for both parities; the partner's sum is the other parity's.
  const float other = __shfl_xor_sync(kFullWarp, sum, 1);
  RowSums<float> row{lane % 2 ? other : sum, lane % 2 ? sum : other};
  const float row_squares = close_row(row, odd_width);
  if (lane == 0) sums.row_squares += row_squares;
  return lane % 2 ? row.odd : row.even;
}

// --- The path through shared memory ---

template <class S, class T>
__device__ inline void align_rows_of_tile(const DeviceLayer& layer, const Tile& tile, S* student, Strides s,
                                          const T* teacher, Strides t, int teacher_begin, Sums& sums) {
  const int lanes = layer.lanes, groups = kThreads / lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int items = tile.channels * tile.rows, columns = layer.columns;
  const bool odd_width = columns % 2 != 0, with_gradient = layer.gradient.data != nullptr;
  const float gradient_scale = layer.gradient_scale, sum_scale = layer.row_weight * gradient_scale;
  for (int first = 0; first < items; first += groups) {
    const int item = first + group;
    const bool active = item < items;
    const int inside = active ? item : 0;
    const int channel = layer.rows_first ? inside / tile.rows : inside % tile.channels;
    const int row = layer.rows_first ? inside % tile.rows : inside / tile.channels;
    ChannelWindow window{int64_t(tile.channel + channel) * layer.ratio, 0};
    int count = layer.ratio;
    if (layer.ratio == 0) {
      window = channel_window(tile.channel + channel, layer.teacher_channels, layer.width);
      count = int(window.end - window.begin);
    }
    S* const s_row = student + channel * s.channel + row * columns * s.position;
    const T* const t_row = teacher + int(window.begin - teacher_begin) * t.channel + row * columns * t.position;
    const float share = 1.0f / float(count);
    const auto difference = [&](int w) {
      const T* p = t_row + w * t.position;
      float pooled = to_float(*p);
      if (count > 1) {
        for (int i = 1; i < count; ++i) pooled += to_float(p[i * t.channel]);
        pooled *= share;
      }
      return to_float(s_row[w * s.position]) - pooled;
    };
    const float sum = sum_row(lane, lanes, active ? columns : 0, odd_width, difference, sums);
    if (!with_gradient || !active) continue;
    // An infinite sum must not turn the plain match's gradient into NaN.
    const float scaled_sum = layer.row_weight != 0 ? sum * sum_scale : 0.0f;
    for (int w = lane; w < columns; w += lanes) {
      const float g = scaled_gradient(difference(w), gradient_scale, scaled_sum);
      if (layer.staged) {
        from_float(g, s_row[w * s.position]);
      } else {
        const int64_t* stride = layer.gradient.stride;
        const int64_t at = tile.image * stride[0] + (tile.channel + channel) * stride[1] +
                           (tile.row + row) * stride[2] + w * stride[3];
        store_gradient(layer.gradient, at, g);
      }
    }
  }
}

template <class S, class T>
__device__ inline void align_tile(const DeviceLayer& layer, int block, char* shared, Sums& sums) {
  const int row_tile = block % layer.row_tiles, rest = block / layer.row_tiles;
  Tile tile;
  tile.image = rest / layer.channel_tiles;
  tile.channel = rest % layer.channel_tiles * layer.channels;
  tile.channels = min(layer.channels, layer.width - tile.channel);
  tile.row = row_tile * layer.rows;
  tile.rows = min(layer.rows, layer.height - tile.row);
  Tile teacher_tile = tile;
  teacher_tile.channel = int(channel_window(tile.channel, layer.teacher_channels, layer.width).begin);
  teacher_tile.channels =
      int(channel_window(tile.channel + tile.channels - 1, layer.teacher_channels, layer.width).end) -
      teacher_tile.channel;

  const Stretches student = stretches_of<S>(layer.student, layer, tile);
  const Stretches teacher = stretches_of<T>(layer.teacher, layer, teacher_tile);
  fetch<S>(student, layer.student, shared + layer.student.offset);
  fetch<T>(teacher, layer.teacher, shared + layer.teacher.offset);
  wait_for_copies();
  __syncthreads();

  char* const student_tile = shared + layer.student.offset + remainder_of(student.start);
  const char* const teacher_tile_start = shared + layer.teacher.offset + remainder_of(teacher.start);
  const int positions = tile.rows * layer.columns;
  align_rows_of_tile(layer, tile, reinterpret_cast<S*>(student_tile), strides_of<S>(layer.student, positions),
                     reinterpret_cast<const T*>(teacher_tile_start), strides_of<T>(layer.teacher, positions),
                     teacher_tile.channel, sums);
  if (!layer.staged) return;
  __syncthreads();
  write_back<S>(stretches_of<S>(layer.gradient, layer, tile), layer.student.lanes_log2, layer.student.pitch,
                student_tile);
}

// --- The direct path ---

// A group of lanes takes a row of one student channel: the pooled rows whose windows hold the channel (one, or two
// where windows of a pooled student overlap). The first channel of a window counts its row's loss.
__device__ inline void align_direct(const DeviceLayer& layer, int block, Sums& sums) {
  constexpr int kLanes = 8, kGroups = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, columns = layer.columns;
  const int64_t rows = int64_t(layer.batch) * layer.student_channels * layer.height;
  const float gradient_scale = layer.gradient_scale, sum_scale = layer.row_weight * gradient_scale;
  for (int k = 0; k < kRowsPerGroup; ++k) {
    const int64_t item = (int64_t(block) * kRowsPerGroup + k) * kGroups + threadIdx.x / kLanes;
    const bool active = item < rows;
    const int64_t inside = active ? item : 0;
    const int h = int(inside % layer.height), channel = int(inside / layer.height % layer.student_channels);
    const int64_t image = inside / layer.height / layer.student_channels;
    const int64_t *ss = layer.student.stride, *ts = layer.teacher.stride;
    const int64_t s_row = image * ss[0] + h * ss[2], t_row = image * ts[0] + h * ts[2];
    const ChannelWindow windows = windows_with_channel(channel, layer.student_channels, layer.width);
    const auto difference = [&](int pooled, int w) {
      return pooled_at(layer.student, s_row + w * ss[3], layer.student_channels, layer.width, pooled) -
             pooled_at(layer.teacher, t_row + w * ts[3], layer.teacher_channels, layer.width, pooled);
    };
    float scaled_sum[2], share[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pooled = int(windows.begin) + i;
      const bool valid = active && pooled < windows.end;
      const ChannelWindow window = channel_window(valid ? pooled : 0, layer.student_channels, layer.width);
      Sums of_row;
      const float sum = sum_row(
          lane, kLanes, valid ? columns : 0, columns % 2 != 0, [&](int w) { return difference(pooled, w); }, of_row);
      if (valid && window.begin == channel) {
        sums.squares += of_row.squares;
        sums.row_squares += of_row.row_squares;
      }
      scaled_sum[i] = layer.row_weight != 0 ? sum * sum_scale : 0.0f;
      share[i] = 1.0f / float(window.end - window.begin);
    }
    const DeviceMap& out = layer.gradient;
    if (out.data == nullptr || !active) continue;
    const int64_t out_row = image * out.stride[0] + channel * out.stride[1] + h * out.stride[2];
    for (int w = lane; w < columns; w += kLanes) {
      float g = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pooled = int(windows.begin) + i;
        if (pooled < windows.end) g += scaled_gradient(difference(pooled, w), gradient_scale, scaled_sum[i]) * share[i];
      }
      store_gradient(out, out_row + w * out.stride[3], g);
    }
  }
}

// --- The launch ---

__device__ inline int blocks_before(const DeviceTable& table, int layer) {
  return layer == table.layers ? table.blocks : table.layer[layer].first_block;
}

// Shares of the blocks are added up by the last block to finish, layer by layer, in an order that depends on the maps
// alone. `totals` outlive this launch where a call takes several.
__device__ inline void add_up(const DeviceTable& table, const double* shares, double* totals, float* losses,
                              double* scratch) {
  for (int l = 0; l < table.layers; ++l) {
    double sum = 0;
    const int end = table.layer[l].batch == 0 ? 0 : blocks_before(table, l + 1);
    for (int i = table.layer[l].first_block + threadIdx.x; i < end; i += kThreads) sum += __ldcg(shares + i);
    sum = sum_over_block(sum, scratch);
    if (threadIdx.x == 0) totals[table.layer[l].place] = sum;
  }
  if (threadIdx.x != 0 || !table.last) return;
  double total = 0;
  for (int l = 0; l < table.all_layers; ++l) {
    total += totals[l];
    if (!table.reduce) losses[l] = float(totals[l]);
  }
  if (table.reduce) losses[0] = float(total);
}

struct Results {
  float* losses;
  double* totals;
  double* shares;
  unsigned* ticket;
};

// The end of every block: its share is written, and the last one adds up.
__device__ inline void finish(const DeviceTable& table, const DeviceLayer& layer, const Sums& sums, Results results,
                              char* shared) {
  double* const scratch = reinterpret_cast<double*>(shared);
  int* const is_last = reinterpret_cast<int*>(shared + 48);
  double sum = sums.squares;
  if (layer.row_weight != 0) sum += sums.row_squares * double(layer.row_weight);
  sum = sum_over_block(sum, scratch);
  if (threadIdx.x == 0) {
    results.shares[blockIdx.x] = sum * layer.loss_scale;
    __threadfence();
    const unsigned blocks = unsigned(table.blocks);
    *is_last = atomicInc(results.ticket, blocks - 1) == blocks - 1;  // and back to 0
  }
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
  add_up(table, results.shares, results.totals, results.losses, scratch);
}

__device__ inline const DeviceLayer& layer_of_block(const DeviceTable& table) {
  int l = 0;
  while (l + 1 < table.layers && table.layer[l + 1].first_block <= int(blockIdx.x)) ++l;
  return table.layer[l];
}

// All layers are maps of S and T.
template <class S, class T>
__global__ void __launch_bounds__(kThreads, 7)
    align_tiles_kernel(const __grid_constant__ DeviceTable table, const Results results) {
  SKD_SHARED_MEMORY(shared);
  const DeviceLayer& layer = layer_of_block(table);
  Sums sums;
  if (layer.batch > 0) align_tile<S, T>(layer, int(blockIdx.x) - layer.first_block, shared, sums);
  finish(table, layer, sums, results, shared);
}

__global__ void __launch_bounds__(kThreads, 4)
    align_direct_kernel(const __grid_constant__ DeviceTable table, const Results results) {
  SKD_SHARED_MEMORY(shared);
  const DeviceLayer& layer = layer_of_block(table);
  Sums sums;
  if (layer.batch > 0) align_direct(layer, int(blockIdx.x) - layer.first_block, sums);
  finish(table, layer, sums, results, shared);
}

__device__ unsigned tickets_of_streams[kStreamTickets];

typedef void (*Kernel)(DeviceTable, Results);

template <class S>
Kernel kernel_of_teacher(DType teacher) {
  switch (teacher) {
    case DType::bfloat16: return align_tiles_kernel<S, bfloat16>;
    case DType::float16: return align_tiles_kernel<S, float16>;
    default: return align_tiles_kernel<S, float>;
  }
}

Kernel kernel_of(const DeviceLayer& layer) {
  if (layer.path == Path::direct) return align_direct_kernel;
  switch (layer.student.dtype) {
    case DType::bfloat16: return kernel_of_teacher<bfloat16>(layer.teacher.dtype);
    case DType::float16: return kernel_of_teacher<float16>(layer.teacher.dtype);
    default: return kernel_of_teacher<float>(layer.teacher.dtype);
  }
}

}  // namespace

void launch_align(const AlignLaunch& launch, float* losses, double* totals, double* shares, unsigned* ticket,
                  cudaStream_t stream) {
  run(kernel_of(launch.table.layer[0]), dim3(unsigned(launch.table.blocks)), kThreads, launch.shared_bytes, stream,
      launch.table, Results{losses, totals, shares, ticket});
}

unsigned* stream_tickets() {
  void* address = nullptr;
  check(cudaGetSymbolAddress(&address, tickets_of_streams), "finding the tickets of streams");
  return static_cast<unsigned*>(address);
}

std::string obstacle_to_align() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, align_tiles_kernel<float, float>);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string("skd's CUDA kernels do not run on this device: ") + cudaGetErrorString(error);
}

}  // namespace skd

// A few tiles through the kernels of fourier_align and spectral_intensity, for ThreadSanitizer.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/fourier_align.h"
#include "cuda/spectral_intensity.h"

using namespace skd;

// The longer lengths' kernels are the same text.
void skd::launch_fourier_32(const FourierLaunch&, cudaStream_t) {}
void skd::launch_fourier_56(const FourierLaunch&, cudaStream_t) {}

namespace {

struct Numbers {
  std::vector<float> memory;
  Map map;

  Numbers(int channels, int height, int columns, bool tokens, float size) : memory(channels * height * columns), map{} {
    for (size_t i = 0; i < memory.size(); ++i) memory[i] = size * std::sin(float(i));
    const int64_t plane = height * columns, all = channels * plane;
    map = tokens ? Map{nullptr, DType::float32, {1, channels, height, columns}, {all, 1, columns * channels, channels}}
                 : Map{nullptr, DType::float32, {1, channels, height, columns}, {all, plane, columns, 1}};
    map.data = reinterpret_cast<char*>(memory.data());
  }
};

bool finite(const std::vector<float>& numbers) {
  for (float x : numbers) {
    if (!std::isfinite(x)) return false;
  }
  return true;
}

// Planes of height x columns with spectra, in two tiles of one block.
bool align(int height, int columns, bool tokens, double focal) {
  constexpr int kChannels = 8;
  Numbers student(kChannels, height, columns, tokens, 1.0f), teacher(2 * kChannels, height, columns, tokens, 0.5f);
  Numbers gradient(kChannels, height, columns, tokens, NAN);
  std::vector<float> spectra(2 * height * (columns / 2 + 1), NAN);
  const FourierArguments layer{
      student.map,        teacher.map, gradient.map, nullptr, reinterpret_cast<char*>(spectra.data()),
      Compare::magnitude, focal,       1.0,          1.0,     2.0};
  FourierPlan plan = plan_fourier({layer});
  FourierLaunch& launch = plan.launches[0];
  FourierLayer& planned = launch.longest == 0 ? launch.general.layer : launch.table.layer[0];
  planned.maps.channels = kChannels / 2, planned.maps.channel_tiles = 2;
  planned.tiles = 2, planned.blocks = 1, launch.blocks = 1;
  std::vector<double> workspace(size_t(plan.workspace_doubles()));
  float loss = NAN;
  plan.place(workspace.data());
  run_fourier(plan, &loss, nullptr);
  std::printf("%s: %g\n", plan.paths[0], double(loss));
  return finite(gradient.memory) && finite(spectra) && std::isfinite(loss) && loss > 0;
}

bool intensity(bool tokens) {
  constexpr int kChannels = 48;
  Numbers x(kChannels, 2, 8, tokens, 1.0f);
  std::vector<float> out(kChannels / 2 + 1, NAN);
  ChannelIntensity plan = plan_channel_intensity(x.map, out.data(), 1.0);
  plan.positions = 8;  // two tiles of a block
  plan.tiles = 2, plan.blocks = 1, plan.launched = 1;
  std::vector<double> workspace(size_t(plan.workspace_doubles()));
  plan.place(workspace.data());
  run_channel_intensity(plan, nullptr);
  std::printf("%s: %g\n", plan.in_pieces ? "pieces" : "numbers", double(out[1]));
  return finite(out);
}

}  // namespace

// What to run: "tile", "general" or "intensity"; everything without an argument.
int main(int count, char** arguments) {
  const auto wanted = [&](const char* name) { return count < 2 || std::strcmp(arguments[1], name) == 0; };
  bool right = true;
  for (bool tokens : {false, true}) {
    if (wanted("tile")) right = align(7, 7, tokens, 1.0) && align(4, 8, tokens, 0.0) && right;
    if (wanted("general")) right = align(3, 6, tokens, 1.0) && align(2, 5, tokens, 0.0) && right;
    if (wanted("intensity")) right = intensity(tokens) && right;
  }
  return right ? 0 : 1;
}

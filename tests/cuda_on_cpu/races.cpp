// A few tiles of each layout through the kernel, for ThreadSanitizer. The scaling kernel is not here: its threads
// exchange nothing.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/spectral_align.h"

using namespace skd;

namespace {

constexpr int kChannels = 16, kHeight = 2, kColumns = 14;

struct Numbers {
  std::vector<float> memory;
  Map map;
};

Numbers make(int channels, bool tokens, float size) {
  Numbers made{std::vector<float>(channels * kHeight * kColumns), {}};
  for (size_t i = 0; i < made.memory.size(); ++i) made.memory[i] = size * std::sin(float(i));
  const int64_t plane = kHeight * kColumns;
  made.map =
      tokens ? Map{nullptr,
                   DType::float32,
                   {1, channels, kHeight, kColumns},
                   {channels * plane, 1, kColumns * channels, channels}}
             : Map{nullptr, DType::float32, {1, channels, kHeight, kColumns}, {channels * plane, plane, kColumns, 1}};
  made.map.data = reinterpret_cast<char*>(made.memory.data());
  return made;
}

}  // namespace

int main() {
  bool right = true;
  for (int layouts = 0; layouts < 4; ++layouts) {
    Numbers student = make(kChannels, layouts & 1, 1.0f), teacher = make(2 * kChannels, layouts & 2, 0.5f);
    Numbers gradient = make(kChannels, layouts & 1, NAN);
    const AlignArguments layer{student.map, teacher.map, gradient.map, 2.0 / kColumns, 1.0, 2.0};
    float loss = NAN;
    for (const AlignLaunch& launch : plan_align({layer}, true)) {
      std::vector<double> workspace(1 + launch.table.blocks);
      unsigned ticket = 0;
      launch_align(launch, &loss, workspace.data(), workspace.data() + 1, &ticket, nullptr);
    }
    for (float g : gradient.memory) right = right && std::isfinite(g);
    right = right && std::isfinite(loss) && loss > 0;
    std::printf("%d: %g\n", layouts, double(loss));
  }
  return right ? 0 : 1;
}

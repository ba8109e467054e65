#include "cpu/instruction_sets.h"

#include <stdexcept>

namespace skd {
namespace {

#define SKD_KERNELS_OF(isa) \
  {#isa, isa::align_kernel, isa::fourier_kernel, isa::channel_intensity_kernel, isa::space_intensity_kernel}

std::vector<InstructionSet> supported() {
  std::vector<InstructionSet> sets;
#if defined(SKD_X86_KERNELS)
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if !defined(__clang__) && __GNUC__ >= 11  // others cannot ask for it; what has AVX2 has had it too
  has_avx2 = has_avx2 && __builtin_cpu_supports("f16c");
#endif
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back(SKD_KERNELS_OF(avx512));
  }
  if (has_avx2) sets.push_back(SKD_KERNELS_OF(avx2));
#endif
  sets.push_back(SKD_KERNELS_OF(baseline));
  return sets;
}

const InstructionSet* chosen = nullptr;

}  // namespace

const std::vector<InstructionSet>& supported_instruction_sets() {
  static const std::vector<InstructionSet> sets = supported();
  return sets;
}

void use_instruction_set(const std::string& name) {
  std::string names;
  for (const InstructionSet& set : supported_instruction_sets()) {
    names += (names.empty() ? "" : ", ") + std::string(set.name);
    if (name.empty() || name == set.name) {
      chosen = &set;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not among what this processor runs: " + names);
}

const InstructionSet& instruction_set_in_use() { return *chosen; }

}  // namespace skd

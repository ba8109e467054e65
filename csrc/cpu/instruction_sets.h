// The kernels in the versions for each instruction set, and the choice among those this processor has.
#pragma once

#include <string>
#include <vector>

#include "cpu/fourier_align.h"
#include "cpu/spectral_align.h"
#include "cpu/spectral_intensity.h"

namespace skd {

struct InstructionSet {
  const char* name;
  const AlignKernel& spectral_align;
  const FourierKernel& fourier_align;
  const IntensityKernel &channel_intensity, &space_intensity;
};

// Those this processor has, the best first.
const std::vector<InstructionSet>& supported_instruction_sets();

// Uses one from now on; the best for an empty name. Throws std::invalid_argument for one that is not supported.
void use_instruction_set(const std::string& name);

const InstructionSet& instruction_set_in_use();

}  // namespace skd

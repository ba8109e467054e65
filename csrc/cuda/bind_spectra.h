// The Python classes FourierPlan and IntensityPlan of skd._cuda.
#pragma once

#include <pybind11/pybind11.h>

namespace skd {

void bind_spectra(pybind11::module_& m);

}  // namespace skd

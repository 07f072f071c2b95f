// Python bindings of formats/: quantize, dequantize and the encodings of weights.
#pragma once

#include <nanobind/nanobind.h>

namespace octavo {

void bind_quants(nanobind::module_& module);

}  // namespace octavo

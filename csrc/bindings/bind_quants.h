// The dequantizer for tests.
#pragma once

#include <nanobind/nanobind.h>

namespace octavo {

void bind_quants(nanobind::module_& module);

}  // namespace octavo

// Python's SamplingBatch as the native one, and the sampler for tests.
#pragma once

#include <nanobind/nanobind.h>

#include "kernels/sampler.h"

namespace octavo {

// The arrays of a Python SamplingBatch (not copied: they live as long as `batch`). Raises TypeError for a wrong dtype
// or a strided array, ValueError for lengths or offsets that do not fit together.
SamplingBatch read_sampling_batch(nanobind::handle batch);

void bind_sampler(nanobind::module_& module);

}  // namespace octavo

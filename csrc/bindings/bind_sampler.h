// Python bindings of kernels/sampler.h: reading a SamplingBatch, and the sampler by itself, for tests.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "kernels/sampler.h"

namespace octavo {

// The arrays of a Python SamplingBatch, which it holds references to: another thread may replace the fields of the
// Python object while a step runs without the GIL.
class SamplingArrays {
public:
    // Throws TypeError for a wrong dtype or a strided array, ValueError for lengths or offsets that do not fit
    // together.
    explicit SamplingArrays(nanobind::handle batch);

    const SamplingBatch& batch() const { return batch_; }

private:
    template <class T>
    const T* per_row(nanobind::handle batch, const char* field);
    const int32_t* offsets(nanobind::handle batch, const char* field, size_t length);
    template <class T>
    nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu> array(
        nanobind::handle batch, const char* field);

    std::vector<nanobind::ndarray<>> held_;
    SamplingBatch batch_;
};

void bind_sampler(nanobind::module_& module);

}  // namespace octavo

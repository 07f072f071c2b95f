// Python's view of quants.h.
#include "bind_quants.h"

#include <nanobind/ndarray.h>

#include "quants.h"

namespace nb = nanobind;

namespace octavo {
namespace {

// Rows of a tensor as they lie in its file, uint8 [rows, bytes per row], into float32 [rows, columns].
void dequantize(int ggml_type, nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> stored,
                nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) {
    const size_t rows = stored.shape(0), columns = out.shape(1);
    const size_t bytes = row_bytes(ggml_type, static_cast<int64_t>(columns));
    if (rows != out.shape(0) || bytes == 0 || bytes != stored.shape(1))
        throw nb::value_error("dequantize: the bytes per row do not fit the format and the number of columns");
    nb::gil_scoped_release release;
    dequantize_row(ggml_type, stored.data(), out.data(), static_cast<int64_t>(rows * columns));
}

}  // namespace

void bind_quants(nb::module_& module) {
    module.def("row_bytes", &row_bytes, nb::arg("ggml_type"), nb::arg("n"));
    module.def("dequantize", &dequantize, nb::arg("ggml_type"), nb::arg("stored").noconvert(),
               nb::arg("out").noconvert());
}

}  // namespace octavo

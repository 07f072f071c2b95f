// Python's view of quants.h.
#include "bind_quants.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "pack.h"
#include "quantise.h"
#include "quants.h"

namespace nb = nanobind;

namespace octavo {
namespace {

// Rows of a tensor as they lie in its file, uint8 [rows, bytes per row], into float32 [rows, columns].
void dequantize(int format, nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> stored,
                nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) {
    const size_t rows = stored.shape(0), columns = out.shape(1);
    const size_t bytes = row_bytes(format, static_cast<int64_t>(columns));
    if (rows != out.shape(0) || bytes == 0 || bytes != stored.shape(1))
        throw nb::value_error("dequantize: the bytes per row do not fit the format and the number of columns");
    nb::gil_scoped_release release;
    dequantize_row(format, stored.data(), out.data(), static_cast<int64_t>(rows * columns));
}

// float32 [rows, columns] into rows of Q8_0 or Q4_1, uint8 [rows, bytes per row].
void quantise(const std::string& format_name,
              nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> values,
              nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) {
    const int format = format_named(format_name);
    const size_t rows = values.shape(0), columns = values.shape(1);
    const size_t bytes = row_bytes(format, static_cast<int64_t>(columns));
    if (rows != out.shape(0) || bytes == 0 || bytes != out.shape(1))
        throw nb::value_error("quantise: the bytes per row do not fit the format and the number of columns");
    nb::gil_scoped_release release;
    if (!quantise_row(format, values.data(), out.data(), static_cast<int64_t>(rows * columns)))
        throw nb::value_error("quantise: the format must be Q8_0 or Q4_1");
}

Encoding encoding_for(const std::vector<std::string>& formats) {
    if (formats.empty()) return {};
    Encoding encoding = encoding_of(format_named(formats[0]));
    for (const std::string& format : formats) encoding = encoding.joined(encoding_of(format_named(format)));
    return encoding;
}

}  // namespace

void bind_quants(nb::module_& module) {
    module.def("row_bytes", &row_bytes, nb::arg("format"), nb::arg("n"));
    nb::class_<Encoding>(module, "Encoding")
        .def_ro("bits", &Encoding::bits)
        .def("__eq__", [](const Encoding& a, const Encoding& b) { return a == b; }, nb::is_operator())
        .def_prop_ro_static("BF16", [](nb::handle) { return Encoding{}; })
        .def_prop_ro_static("W8", [](nb::handle) { return kW8; })
        .def_prop_ro_static("W4", [](nb::handle) { return kW4; });
    module.def("encoding_for", &encoding_for, nb::arg("formats"));
    module.def("quantise", &quantise, nb::arg("format"), nb::arg("values").noconvert(), nb::arg("out").noconvert());
    module.def("dequantize", &dequantize, nb::arg("format"), nb::arg("stored").noconvert(),
               nb::arg("out").noconvert());
}

}  // namespace octavo

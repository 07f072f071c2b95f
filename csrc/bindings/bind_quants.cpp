// Python bindings of formats/quants.h, formats/quantize.h and formats/encoding.h.
#include "bind_quants.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "formats/pack.h"
#include "formats/quantize.h"
#include "formats/quants.h"
#include "runtime/isa.h"

namespace nb = nanobind;

namespace octavo {
namespace {

// Dequantizes rows of a tensor as its file stores them, uint8 [rows, bytes per row], to float32 [rows, columns].
void dequantize(int format, nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> stored,
                nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) {
    const size_t rows = stored.shape(0), columns = out.shape(1);
    const size_t bytes = row_bytes(format, static_cast<int64_t>(columns));
    if (rows != out.shape(0) || bytes == 0 || bytes != stored.shape(1))
        throw nb::value_error("dequantize: the bytes per row do not fit the format and the shape of out");
    nb::gil_scoped_release release;
    dequantize_row(format, stored.data(), out.data(), static_cast<int64_t>(rows * columns));
}

// Quantizes float32 [rows, columns] to rows of Q8_0 or Q4_1, uint8 [rows, bytes per row]. `importance`, for Q4_1, is
// float32 [columns]: the weight of squared errors in each column.
nb::object quantize(nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> values,
                    const std::string& format_name,
                    std::optional<nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>> importance,
                    std::optional<std::string> isa) {
    const int format = format_named(format_name);
    const auto rows = static_cast<int64_t>(values.shape(0)), columns = static_cast<int64_t>(values.shape(1));
    const auto bytes = static_cast<int64_t>(row_bytes(format, columns));
    if (format != FORMAT_Q8_0 && format != FORMAT_Q4_1)
        throw nb::value_error("quantize: the format must be Q8_0 or Q4_1");
    if (columns % kQuantGroup) throw nb::value_error("quantize: the columns must be a multiple of 32");
    if (importance && static_cast<int64_t>(importance->size()) != columns)
        throw nb::value_error("quantize: importance must have one entry per column");
    const FourBitsKernel search = kernels_for(isa ? *isa : available_isas().front()).quantize_to_4;
    auto* to = new uint8_t[rows * bytes + 1];
    const nb::capsule owner(to, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    {
        nb::gil_scoped_release release;
        const std::vector<float> weights = column_weights(importance ? importance->data() : nullptr, columns);
        for (int64_t row = 0; row < rows; row += kBlock) {
            const int64_t count = std::min(kBlock, rows - row);
            const float* from = values.data() + row * columns;
            if (format == FORMAT_Q8_0)
                quantize_to_q8_0(from, to + row * bytes, count * columns);
            else
                quantize_to_q4_1(search, from, weights.data(), to + row * bytes, count, columns);
        }
    }
    return nb::cast(nb::ndarray<nb::numpy, uint8_t>(to, {size_t(rows), size_t(bytes)}, owner));
}

// Return the smallest encoding that holds every value of tensors in these formats without loss.
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
        .def(
            "__eq__", [](const Encoding& a, const Encoding& b) { return a == b; }, nb::is_operator())
        .def_prop_ro_static("BF16", [](nb::handle) { return Encoding{}; })
        .def_prop_ro_static("W8", [](nb::handle) { return kW8; })
        .def_prop_ro_static("W4", [](nb::handle) { return kW4; });
    module.def("encoding_for", &encoding_for, nb::arg("formats"));
    module.def("quantize", &quantize, nb::arg("values").noconvert(), nb::arg("format"),
               nb::arg("importance") = nb::none(), nb::arg("isa") = nb::none());
    module.def("dequantize", &dequantize, nb::arg("format"), nb::arg("stored").noconvert(), nb::arg("out").noconvert());
}

}  // namespace octavo

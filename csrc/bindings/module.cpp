// The extension module octavo.backends.cpu._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "bind_quants.h"
#include "bind_sampler.h"
#include "runtime/program.h"
#include "formats/quants.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace octavo {
namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class A>
A read_field(nb::handle batch, const char* field) {
    A array;
    if (!nb::try_cast(batch.attr(field), array, false))
        throw nb::type_error((std::string("StepBatch.") + field + " has the wrong dtype or layout").c_str());
    return array;
}

// Points into the arrays of a StepBatch, which must outlive it.
Batch read_batch(nb::handle batch) {
    const auto tokens = read_field<Array<int32_t>>(batch, "tokens");
    const auto positions = read_field<Array<int32_t>>(batch, "positions");
    const auto query_start = read_field<Array<int32_t>>(batch, "query_start");
    const auto page_tables = read_field<Table<int32_t>>(batch, "page_tables");
    const auto sample_rows = read_field<Array<int32_t>>(batch, "sample_rows");
    if (tokens.shape(0) != positions.shape(0)) throw nb::value_error("tokens and positions must be as many");
    if (query_start.shape(0) != page_tables.shape(0) + 1)
        throw nb::value_error("query_start must have one entry more than page_tables has rows");
    return {int64_t(tokens.shape(0)), int64_t(page_tables.shape(0)), int64_t(page_tables.shape(1)),
            int64_t(sample_rows.shape(0)), tokens.data(), positions.data(), query_start.data(), page_tables.data(),
            sample_rows.data()};
}

// A new numpy array, and where its values are.
template <class T, class... Shape>
std::pair<nb::object, T*> new_array(Shape... shape) {
    size_t size = (size_t(shape) * ... * 1);
    T* data = new T[size ? size : 1];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return {nb::cast(nb::ndarray<nb::numpy, T>(data, {size_t(shape)...}, owner)), data};
}

// (tokens, logprobs, ranks, top_tokens, top_logprobs) of StepResult.
nb::tuple step(Program& program, nb::handle python_batch) {
    const Batch batch = read_batch(python_batch);
    const nb::object python_sampling = python_batch.attr("sampling");
    const SamplingBatch sampling = read_sampling_batch(python_sampling);
    const int64_t rows = batch.sampled;
    bool wanted = false;
    for (int64_t r = 0; r < sampling.rows; r++) wanted |= sampling.num_logprobs[r] >= 0;

    auto [tokens, token] = new_array<int32_t>(rows);
    Sampled result{token, nullptr, nullptr, 0, nullptr, nullptr};
    nb::object logprobs = nb::none(), ranks = nb::none(), top_tokens = nb::none(), top_logprobs = nb::none();
    if (wanted) {
        result.top = std::max(0, sampling.max_logprobs());
        std::tie(logprobs, result.logprobs) = new_array<float>(rows);
        std::tie(ranks, result.ranks) = new_array<int32_t>(rows);
        std::tie(top_tokens, result.top_tokens) = new_array<int32_t>(rows, result.top);
        std::tie(top_logprobs, result.top_logprobs) = new_array<float>(rows, result.top);
    }
    {
        nb::gil_scoped_release release;
        program.step(batch, sampling, result);
    }
    return nb::make_tuple(tokens, logprobs, ranks, top_tokens, top_logprobs);
}

nb::object logits(Program& program, nb::handle python_batch) {
    const Batch batch = read_batch(python_batch);
    auto [array, data] = new_array<float>(batch.sampled, program.logits_width());
    {
        nb::gil_scoped_release release;
        program.logits(batch, data);
    }
    return array;
}

nb::object squares(const Program& program, int observed) {
    const std::vector<double>& sums = program.squares(observed);
    auto [array, data] = new_array<double>(sums.size());
    std::copy(sums.begin(), sums.end(), data);
    return array;
}

// A view of a page of the KV pool, which keeps the program alive.
nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> export_page(nb::handle self, int64_t page) {
    const Program& program = nb::cast<const Program&>(self);
    return {program.page(page), {size_t(program.page_bytes())}, self};
}

void import_page(Program& program, int64_t page, Array<uint8_t> content) {
    std::byte* target = program.page(page);
    if (int64_t(content.size()) != program.page_bytes()) throw nb::value_error("content must have page_bytes bytes");
    nb::gil_scoped_release release;
    std::memcpy(target, content.data(), content.size());
}

// Keeps the GIL: that takes 50 us, and to get it back from another thread can take 100 times as long.
void copy_page(Program& program, int64_t source, int64_t target) {
    std::memmove(program.page(target), program.page(source), program.page_bytes());
}

// Parts of a weight, stacked by rows: (data, format, row_order or None) as Tensor has them. Returns -1, or the index of a
// part with a value that cannot be stored, such as NaN.
int pack(Program& program, int weight, nb::list parts, int64_t rows, int64_t columns,
          std::optional<Array<float>> importance) {
    std::vector<Part> native;
    int64_t total = 0;
    for (nb::handle item : parts) {
        const auto part = nb::cast<nb::tuple>(item);
        const auto data = nb::cast<Table<uint8_t>>(part[0]);
        const int format = format_named(nb::cast<std::string>(part[1]));
        if (format < 0 || row_bytes(format, columns) != data.shape(1))
            throw nb::value_error("the bytes per row do not fit the format and the number of columns");
        Part p{data.data(), int64_t(data.shape(0)), int64_t(data.shape(1)), format, nullptr};
        if (!part[2].is_none()) {
            const auto order = nb::cast<Array<int64_t>>(part[2]);
            if (order.shape(0) != data.shape(0)) throw nb::value_error("row_order must have one entry per row");
            for (size_t i = 0; i < order.shape(0); i++)
                if (order(i) < 0 || order(i) >= p.rows) throw nb::value_error("row_order must name rows of the tensor");
            p.row_order = order.data();
        }
        total += p.rows;
        native.push_back(p);
    }
    if (total != rows) throw nb::value_error("the parts must have as many rows as the weight");
    if (importance && int64_t(importance->size()) != columns)
        throw nb::value_error("importance must have one entry per column");
    nb::gil_scoped_release release;
    return program.pack(weight, native, importance ? importance->data() : nullptr);
}

nb::tuple linears(const LinearWeights& weights) {
    return nb::make_tuple(weights.bytes, double(weights.integers) / double(std::max<int64_t>(weights.values, 1)));
}

}  // namespace

NB_MODULE(_native, module) {
    bind_sampler(module);
    bind_quants(module);
    module.def("available_isas", &available_isas);

    nb::enum_<Activation>(module, "Activation")
        .value("silu", Activation::silu)
        .value("gelu_tanh", Activation::gelu_tanh);

    nb::class_<Program>(module, "Program")
        .def(
            "__init__",
            [](Program* self, const std::string& isa, std::vector<int> cores, int64_t vocab, int64_t heads,
               int64_t kv_heads, int64_t head_dim, int64_t layers, double norm_eps, int64_t page_size, int64_t max_rows,
               int64_t max_sampled, std::vector<double> frequencies, bool int8_kv) {
                const Sizes sizes{vocab, heads, kv_heads, head_dim, layers, norm_eps, page_size, max_rows,
                                  max_sampled, int8_kv};
                new (self) Program(isa, std::move(cores), sizes, std::move(frequencies));
            },
            nb::kw_only(), "isa"_a, "cores"_a, "vocab"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "layers"_a,
            "norm_eps"_a, "page_size"_a, "max_rows"_a, "max_sampled"_a, "frequencies"_a, "int8_kv"_a = false)
        .def("vector", [](Program& p, Array<float> values) { return p.vector(values.data(), values.shape(0)); })
        .def("weight", &Program::weight, "rows"_a, "columns"_a, "encoding"_a)
        .def("weight", [](Program& p, int64_t rows, int64_t columns) { return p.weight(rows, columns, {}); })
        .def("embed", &Program::embed)
        .def("norm", &Program::norm)
        .def("linear", &Program::linear, "x"_a, "weight"_a, "bias"_a, "residual"_a)
        .def("rope_and_cache", &Program::rope_and_cache, "qkv"_a, "layer"_a, "q_norm"_a, "k_norm"_a)
        .def("attention", &Program::attention, "q"_a, "layer"_a, "window"_a)
        .def("gated", &Program::gated)
        .def("sampled_rows", &Program::sampled_rows)
        .def("observe", &Program::observe)
        .def("squares", &squares, "observed"_a)
        .def("finish", &Program::finish, "logits"_a)
        .def("pack", &pack, "weight"_a, "parts"_a, "rows"_a, "columns"_a, "importance"_a = nb::none())
        .def_prop_ro("page_bytes", &Program::page_bytes)
        .def_prop_ro("weight_bytes", &Program::weight_bytes)
        .def("allocate_kv", &Program::allocate_kv)
        .def("export_page", &export_page, "page"_a)
        .def("import_page", &import_page, "page"_a, "content"_a.noconvert())
        .def("copy_page", &copy_page, "source"_a, "target"_a)
        .def("step", &step)
        .def("logits", &logits)
        .def_prop_ro("layers", [](Program& p) { return linears(p.linears(false)); })
        .def_prop_ro("head", [](Program& p) { return linears(p.linears(true)); })
        .def("ceilings",
             [](Program& p) {
                 Ceilings ceilings;
                 {
                     nb::gil_scoped_release release;
                     ceilings = p.ceilings();
                 }
                 return nb::make_tuple(ceilings.bytes_per_second, ceilings.operations_per_second,
                                       ceilings.integer_operations_per_second);
             })
        .def("profile", &Program::profile, "on"_a)
        .def("times", &Program::times);
}

}  // namespace octavo

// The extension module octavo.backends.cpu._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <tuple>

#include "bind_quants.h"
#include "bind_sampler.h"
#include "formats/quants.h"
#include "runtime/program.h"

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

// The arrays of a Python StepBatch. Holds references to them: another thread may replace the fields of `batch` while a
// step runs without the GIL.
class BatchArrays {
public:
    explicit BatchArrays(nb::handle batch)
        : tokens_(read_field<Array<int32_t>>(batch, "tokens")),
          positions_(read_field<Array<int32_t>>(batch, "positions")),
          query_start_(read_field<Array<int32_t>>(batch, "query_start")),
          page_tables_(read_field<Table<int32_t>>(batch, "page_tables")),
          sample_rows_(read_field<Array<int32_t>>(batch, "sample_rows")) {
        if (tokens_.shape(0) != positions_.shape(0))
            throw nb::value_error("StepBatch.positions must have one entry per token");
        if (query_start_.shape(0) != page_tables_.shape(0) + 1)
            throw nb::value_error("StepBatch.query_start must have one entry more than page_tables has rows");
    }

    Batch batch() const {
        return {int64_t(tokens_.shape(0)),
                int64_t(page_tables_.shape(0)),
                int64_t(page_tables_.shape(1)),
                int64_t(sample_rows_.shape(0)),
                tokens_.data(),
                positions_.data(),
                query_start_.data(),
                page_tables_.data(),
                sample_rows_.data()};
    }

private:
    Array<int32_t> tokens_, positions_, query_start_;
    Table<int32_t> page_tables_;
    Array<int32_t> sample_rows_;
};

// Return a new numpy array, and a pointer to its values.
template <class T, class... Shape>
std::pair<nb::object, T*> new_array(Shape... shape) {
    size_t size = (size_t(shape) * ... * 1);
    T* data = new T[size ? size : 1];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return {nb::cast(nb::ndarray<nb::numpy, T>(data, {size_t(shape)...}, owner)), data};
}

// The arrays of a Python PoolingBatch, which it holds references to, and those of its results.
struct PoolingArrays {
    nb::object sums = nb::none(), label_logits = nb::none();
    Pooling pooling;

    PoolingArrays(const Program& program, nb::handle batch) {
        if (batch.is_none()) return;
        first_ = read_field<Array<int32_t>>(batch, "first"), end_ = read_field<Array<int32_t>>(batch, "end");
        label_rows_ = read_field<Array<int32_t>>(batch, "label_rows");
        label_tokens_ = read_field<Array<int32_t>>(batch, "label_tokens");
        const auto before = read_field<Table<double>>(batch, "sums");
        const size_t ranges = first_.shape(0), labels = label_rows_.shape(0), width = size_t(program.pooled_width());
        if (end_.shape(0) != ranges || before.shape(0) != ranges || before.shape(1) != width)
            throw nb::value_error("PoolingBatch.end and sums must have one entry per range, of the hidden size");
        if (label_tokens_.shape(0) != labels)
            throw nb::value_error("PoolingBatch.label_tokens must have one entry per label row");
        pooling = {int64_t(ranges), int64_t(labels), first_.data(), end_.data()};
        pooling.label_rows = label_rows_.data(), pooling.label_tokens = label_tokens_.data();
        std::tie(sums, pooling.sums) = new_array<double>(ranges, width);
        std::copy_n(before.data(), before.size(), pooling.sums);
        std::tie(label_logits, pooling.label_logits) = new_array<float>(labels);
    }

private:
    Array<int32_t> first_, end_, label_rows_, label_tokens_;
};

// Run a step; return the fields of StepResult: (tokens, logprobs, ranks, top_tokens, top_logprobs, sums, label_logits).
nb::tuple step(Program& program, nb::handle python_batch) {
    const BatchArrays arrays(python_batch);
    const Batch batch = arrays.batch();
    const PoolingArrays pooled(program, python_batch.attr("pooling"));
    const SamplingArrays sampling_arrays(python_batch.attr("sampling"));
    const SamplingBatch& sampling = sampling_arrays.batch();
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
        program.step(batch, sampling, pooled.pooling, result);
    }
    return nb::make_tuple(tokens, logprobs, ranks, top_tokens, top_logprobs, pooled.sums, pooled.label_logits);
}

nb::object logits(Program& program, nb::handle python_batch) {
    const BatchArrays arrays(python_batch);
    const Batch batch = arrays.batch();
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

// Return a page of the KV pool, uint8 [page_bytes], without a copy. The array keeps the pool's memory alive, even after
// the program is closed or allocate_kv has replaced the pool.
nb::object export_page(const Program& program, int64_t page) {
    const std::byte* data = program.page(page);
    auto pool = std::make_unique<std::shared_ptr<const Memory>>(program.kv_memory());
    const nb::capsule owner(pool.get(),
                            [](void* p) noexcept { delete static_cast<std::shared_ptr<const Memory>*>(p); });
    (void)pool.release();
    return nb::cast(nb::ndarray<nb::numpy, const uint8_t>(data, {size_t(program.page_bytes())}, owner));
}

void import_page(Program& program, int64_t page, Array<uint8_t> content) {
    std::byte* target = program.page(page);
    if (int64_t(content.size()) != program.page_bytes()) throw nb::value_error("content must have page_bytes bytes");
    nb::gil_scoped_release release;
    std::memmove(target, content.data(), content.size());  // the content may be this page
}

// Keeps the GIL: a copy takes 50 us, while reacquiring the GIL from a busy thread can take 5 ms.
void copy_page(Program& program, int64_t source, int64_t target) {
    std::memmove(program.page(target), program.page(source), program.page_bytes());
}

// One part of a weight, from Python's (data, format, row_order or None), and the first column if it is not 0, as the
// fields of Tensor. Holds the arrays that `part` points into: they may be copies, made here of arrays with another
// layout.
struct PartArrays {
    Table<uint8_t> data;
    std::optional<Array<int64_t>> row_order;
    Part part;

    PartArrays(nb::handle item, int64_t columns) {
        const nb::object stored = item[0], order = item[2];
        const auto format = nb::cast<std::string>(item[1]);
        const int64_t first = nb::len(item) > 3 ? nb::cast<int64_t>(item[3]) : 0;
        if (!is_uint8(stored) || !nb::try_cast(stored, data))
            throw nb::type_error("the data of a part must be uint8 [rows, bytes per row]");
        const int number = format_named(format);
        const int64_t used = first + columns, most = used + kMostSkipped / 2;
        int64_t whole = used;  // columns in whole blocks
        while (whole < most && row_bytes(number, whole) == 0) whole++;
        if (number < 0 || first < 0 || first >= kMostSkipped / 2 || row_bytes(number, whole) != data.shape(1))
            throw nb::value_error("the bytes per row do not fit the format and the number of columns");
        const int64_t bytes = int64_t(data.shape(1));
        part = {data.data(), int64_t(data.shape(0)), bytes, number, nullptr, first, whole};
        if (!order.is_none()) read_order(order);
    }

private:
    void read_order(nb::handle order) {
        Array<int64_t> rows;
        if (!nb::try_cast(order, rows)) throw nb::type_error("row_order must be int64 [rows]");
        for (size_t i = 0; i < rows.shape(0); i++)
            if (rows(i) < 0 || rows(i) >= part.rows) throw nb::value_error("row_order must name rows of the tensor");
        part.row_order = rows.data(), part.rows = int64_t(rows.shape(0));
        row_order = std::move(rows);
    }

    // A copy may change the layout of stored bytes, but must not convert other values to them.
    static bool is_uint8(nb::handle array) { return nb::isinstance<nb::ndarray<const uint8_t, nb::ro>>(array); }
};

// Write a weight [rows, columns] that is stored in `parts`, each with some of its rows, in order. Return -1, or the index
// of a part with a value that cannot be stored, such as NaN.
int pack(Program& program, int weight, nb::list parts, int64_t rows, int64_t columns,
         std::optional<Array<float>> importance) {
    std::vector<PartArrays> arrays;
    std::vector<Part> native;
    int64_t total = 0;
    for (nb::handle item : parts) {
        native.push_back(arrays.emplace_back(item, columns).part);
        total += native.back().rows;
    }
    if (total != rows) throw nb::value_error("the parts must have as many rows as the weight");
    if (importance && int64_t(importance->size()) != columns)
        throw nb::value_error("importance must have one entry per column");
    nb::gil_scoped_release release;
    return program.pack(weight, native, rows, columns, importance ? importance->data() : nullptr);
}

// Return the sum of the partial sums of 1, 2, 4 or 8 ranks, + bias + residual: float32 [values], a multiple of 16.
nb::object sum_partials(const std::string& isa, const std::vector<Array<float>>& partials,
                        std::optional<Array<float>> bias, std::optional<Array<float>> residual) {
    const size_t ranks = partials.size(), count = ranks ? partials[0].size() : 0;
    if (!std::has_single_bit(ranks) || ranks > kMaxSpans) throw nb::value_error("there must be 1, 2, 4 or 8 partials");
    if (count % kBlock) throw nb::value_error("the number of values must be a multiple of 16");
    const float* data[kMaxSpans] = {};
    for (size_t i = 0; i < ranks; i++) data[i] = partials[i].data();
    const auto fits = [&](const Array<float>& array) { return array.size() == count; };
    if (!std::all_of(partials.begin(), partials.end(), fits) || (bias && !fits(*bias)) ||
        (residual && !fits(*residual)))
        throw nb::value_error("all arrays must have the same size");
    auto [array, out] = new_array<float>(count);
    kernels_for(isa).sum_partials(data, int64_t(ranks), bias ? bias->data() : nullptr,
                                  residual ? residual->data() : nullptr, out, int64_t(count));
    return array;
}

// Return (bytes, share of the values that are stored as integers).
nb::tuple linears(const LinearWeights& weights) {
    return nb::make_tuple(weights.bytes, double(weights.integers) / double(std::max<int64_t>(weights.values, 1)));
}

}  // namespace

NB_MODULE(_native, module) {
    nb::set_leak_warnings(false);  // no warnings if an engine is still alive at exit
    bind_sampler(module);
    bind_quants(module);
    module.def("available_isas", &available_isas);
    module.def("sum_partials", &sum_partials, "isa"_a, "partials"_a, "bias"_a = nb::none(), "residual"_a = nb::none());

    module.def("stop_ranks", [](int group) { RankGroup(0, 1, group).stop(); }, "group"_a);

    nb::enum_<Activation>(module, "Activation")
        .value("silu", Activation::silu)
        .value("gelu_tanh", Activation::gelu_tanh);

    nb::class_<Program>(module, "Program")
        .def(
            "__init__",
            [](Program* self, const std::string& isa, std::vector<std::vector<int>> processors, int64_t vocab,
               int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t layers, double norm_eps, int64_t page_size,
               int64_t max_rows, int64_t max_sampled, std::vector<double> frequencies, bool int8_kv, int rank,
               int ranks, int group, int kv, std::vector<int> lines) {
                const Sizes sizes{vocab,    heads,     kv_heads, head_dim,    layers,
                                  norm_eps, page_size, max_rows, max_sampled, int8_kv};
                auto others = ranks > 1 ? std::make_unique<RankGroup>(rank, ranks, group, std::move(lines)) : nullptr;
                new (self) Program(isa, std::move(processors), sizes, std::move(frequencies), std::move(others), kv);
            },
            nb::kw_only(), "isa"_a, "processors"_a, "vocab"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "layers"_a,
            "norm_eps"_a, "page_size"_a, "max_rows"_a, "max_sampled"_a, "frequencies"_a, "int8_kv"_a = false,
            "rank"_a = 0, "ranks"_a = 1, "group"_a = -1, "kv"_a = -1, "lines"_a = std::vector<int>{})
        .def("vector", [](Program& p, Array<float> values) { return p.vector(values.data(), values.shape(0)); })
        .def("weight", &Program::weight, "rows"_a, "columns"_a, "encoding"_a = Encoding{},
             "spans"_a = std::vector<int64_t>{})
        .def("embed", &Program::embed, "weight"_a, "first_token"_a = 0, "ends"_a = std::vector<int64_t>{})
        .def("norm", &Program::norm)
        .def("linear", &Program::linear, "x"_a, "weight"_a, "bias"_a, "residual"_a)
        .def("rope_and_cache", &Program::rope_and_cache, "qkv"_a, "layer"_a, "q_norm"_a, "k_norm"_a)
        .def("attention", &Program::attention, "q"_a, "layer"_a, "window"_a)
        .def("gated", &Program::gated)
        .def("all_reduce", &Program::all_reduce, "x"_a, "bias"_a, "residual"_a)
        .def("all_gather", &Program::all_gather, "x"_a, "first_column"_a, "columns"_a, "residual"_a,
             "ends"_a = std::vector<int64_t>{})
        .def_prop_ro("nodes", &Program::nodes)
        .def("pool_rows", &Program::pool_rows, "x"_a, "vector"_a)
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
        .def("gather_rows", &Program::gather_rows)
        .def("follow", &Program::follow, nb::call_guard<nb::gil_scoped_release>())
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
        .def("times", &Program::times)
        .def("sampling_seconds", &Program::sampling_seconds);
}

}  // namespace octavo

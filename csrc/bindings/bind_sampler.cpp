// Python's view of sampler.h.
#include "bind_sampler.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "runtime/isa.h"

namespace nb = nanobind;

namespace octavo {
namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::string name_of(const char* field) { return std::string("SamplingBatch.") + field; }

template <class T>
Vector<const T> read_field(nb::handle batch, const char* field) {
    Vector<const T> array;
    if (!nb::try_cast(batch.attr(field), array, false))
        throw nb::type_error((name_of(field) + " has the wrong dtype or layout").c_str());
    return array;
}

template <class T>
const T* read_per_row(nb::handle batch, const char* field, size_t rows) {
    const auto array = read_field<T>(batch, field);
    if (array.shape(0) != rows) throw nb::value_error((name_of(field) + " must have one entry per row").c_str());
    return array.data();
}

// rows + 1 ascending offsets into an array of `length` entries.
const int32_t* read_offsets(nb::handle batch, const char* field, size_t rows, size_t length) {
    const auto array = read_field<int32_t>(batch, field);
    const int32_t* start = array.data();
    if (array.shape(0) != rows + 1 || start[0] < 0 || !std::is_sorted(start, start + rows + 1) ||
        static_cast<size_t>(start[rows]) > length)
        throw nb::value_error((name_of(field) + " must be rows + 1 ascending offsets into its array").c_str());
    return start;
}

// Samples the rows of `logits` [R, vocab], which are overwritten, into arrays laid out as those of StepResult.
void sample(const std::string& isa, Matrix<float> logits, nb::handle python_batch, Vector<int32_t> tokens,
            Vector<float> logprobs, Vector<int32_t> ranks, Matrix<int32_t> top_tokens, Matrix<float> top_logprobs) {
    const Scan& scan = kernels_for(isa).scan;
    const SamplingBatch batch = read_sampling_batch(python_batch);
    const size_t rows = logits.shape(0), vocab = logits.shape(1), top = top_tokens.shape(1);
    for (size_t length : {static_cast<size_t>(batch.rows), tokens.shape(0), logprobs.shape(0), ranks.shape(0),
                          top_tokens.shape(0), top_logprobs.shape(0)})
        if (length != rows) throw nb::value_error("sample: every array must have one entry per row of logits");
    if (top != top_logprobs.shape(1) || static_cast<int64_t>(top) < batch.max_logprobs())
        throw nb::value_error("sample: top_tokens and top_logprobs must have max(num_logprobs) columns");

    nb::gil_scoped_release release;
    SamplerScratch scratch(static_cast<int32_t>(vocab));
    for (size_t r = 0; r < rows; ++r) {
        const auto sampled = sample_row(logits.data() + r * vocab, static_cast<int32_t>(vocab),
                                        batch.row(static_cast<int32_t>(r)), scan, scratch, top_tokens.data() + r * top,
                                        top_logprobs.data() + r * top, static_cast<int32_t>(top));
        tokens.data()[r] = sampled.token;
        logprobs.data()[r] = sampled.logprob;
        ranks.data()[r] = sampled.rank;
    }
}

}  // namespace

SamplingBatch read_sampling_batch(nb::handle batch) {
    const size_t rows = read_field<float>(batch, "temperature").shape(0);
    const auto history = read_field<int32_t>(batch, "history");
    const auto bias_tokens = read_field<int32_t>(batch, "bias_tokens");
    const auto bias_values = read_field<float>(batch, "bias_values");
    if (bias_tokens.shape(0) != bias_values.shape(0))
        throw nb::value_error("SamplingBatch.bias_values must have one entry per bias token");
    return {
        .rows = static_cast<int32_t>(rows),
        .temperature = read_per_row<float>(batch, "temperature", rows),
        .top_k = read_per_row<int32_t>(batch, "top_k", rows),
        .top_p = read_per_row<float>(batch, "top_p", rows),
        .min_p = read_per_row<float>(batch, "min_p", rows),
        .seeds = read_per_row<uint64_t>(batch, "seeds", rows),
        .positions = read_per_row<int64_t>(batch, "positions", rows),
        .num_logprobs = read_per_row<int32_t>(batch, "num_logprobs", rows),
        .repetition = read_per_row<float>(batch, "repetition", rows),
        .presence = read_per_row<float>(batch, "presence", rows),
        .frequency = read_per_row<float>(batch, "frequency", rows),
        .history = history.data(),
        .history_start = read_offsets(batch, "history_start", rows, history.shape(0)),
        .history_outputs = read_per_row<int32_t>(batch, "history_outputs", rows),
        .bias_tokens = bias_tokens.data(),
        .bias_values = bias_values.data(),
        .bias_start = read_offsets(batch, "bias_start", rows, bias_tokens.shape(0)),
    };
}

void bind_sampler(nb::module_& module) {
    module.def("sample", &sample, nb::arg("isa"), nb::arg("logits").noconvert(), nb::arg("batch"),
               nb::arg("tokens").noconvert(), nb::arg("logprobs").noconvert(), nb::arg("ranks").noconvert(),
               nb::arg("top_tokens").noconvert(), nb::arg("top_logprobs").noconvert());
    module.def("philox4x32", &philox4x32, nb::arg("counter"), nb::arg("key"));
}

}  // namespace octavo

// Python bindings of kernels/sampler.h.
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

// Sample each row of `logits` [R, vocab], which is overwritten, into arrays shaped like those of StepResult.
void sample(const std::string& isa, Matrix<float> logits, nb::handle python_batch, Vector<int32_t> tokens,
            Vector<float> logprobs, Vector<int32_t> ranks, Matrix<int32_t> top_tokens, Matrix<float> top_logprobs) {
    const Scan& scan = kernels_for(isa).scan;
    const SamplingArrays arrays(python_batch);
    const SamplingBatch& batch = arrays.batch();
    const size_t rows = logits.shape(0), vocab = logits.shape(1), top = top_tokens.shape(1);
    for (size_t length : {static_cast<size_t>(batch.rows), tokens.shape(0), logprobs.shape(0), ranks.shape(0),
                          top_tokens.shape(0), top_logprobs.shape(0)})
        if (length != rows) throw nb::value_error("sample: every array must have one entry per row of logits");
    if (top != top_logprobs.shape(1) || static_cast<int64_t>(top) < batch.max_logprobs())
        throw nb::value_error("sample: top_tokens and top_logprobs must have max(num_logprobs) columns");

    nb::gil_scoped_release release;
    SamplerScratch scratch(static_cast<int32_t>(vocab));
    for (size_t r = 0; r < rows; ++r) {
        const auto sampled =
            sample_row(logits.data() + r * vocab, static_cast<int32_t>(vocab), batch.row(static_cast<int32_t>(r)), scan,
                       scratch, top_tokens.data() + r * top, top_logprobs.data() + r * top, static_cast<int32_t>(top));
        tokens.data()[r] = sampled.token;
        logprobs.data()[r] = sampled.logprob;
        ranks.data()[r] = sampled.rank;
    }
}

}  // namespace

template <class T>
Vector<const T> SamplingArrays::array(nb::handle batch, const char* field) {
    Vector<const T> array;
    if (!nb::try_cast(batch.attr(field), array, false))
        throw nb::type_error((name_of(field) + " has the wrong dtype or layout").c_str());
    held_.emplace_back(array);
    return array;
}

template <class T>
const T* SamplingArrays::per_row(nb::handle batch, const char* field) {
    const auto values = array<T>(batch, field);
    if (values.shape(0) != static_cast<size_t>(batch_.rows))
        throw nb::value_error((name_of(field) + " must have one entry per row").c_str());
    return values.data();
}

// Return rows + 1 ascending offsets into an array of `length` entries.
const int32_t* SamplingArrays::offsets(nb::handle batch, const char* field, size_t length) {
    const auto values = array<int32_t>(batch, field);
    const int32_t* start = values.data();
    const auto rows = static_cast<size_t>(batch_.rows);
    if (values.shape(0) != rows + 1 || start[0] < 0 || !std::is_sorted(start, start + rows + 1) ||
        static_cast<size_t>(start[rows]) > length)
        throw nb::value_error((name_of(field) + " must be rows + 1 ascending offsets into its array").c_str());
    return start;
}

SamplingArrays::SamplingArrays(nb::handle batch) {
    const auto temperature = array<float>(batch, "temperature");
    const auto history = array<int32_t>(batch, "history");
    const auto bias_tokens = array<int32_t>(batch, "bias_tokens");
    const auto bias_values = array<float>(batch, "bias_values");
    const auto masks = array<uint32_t>(batch, "masks");
    if (bias_tokens.shape(0) != bias_values.shape(0))
        throw nb::value_error("SamplingBatch.bias_values must have one entry per bias token");
    batch_.rows = static_cast<int32_t>(temperature.shape(0));
    batch_ = {
        .rows = batch_.rows,
        .temperature = temperature.data(),
        .top_k = per_row<int32_t>(batch, "top_k"),
        .top_p = per_row<float>(batch, "top_p"),
        .min_p = per_row<float>(batch, "min_p"),
        .seeds = per_row<uint64_t>(batch, "seeds"),
        .positions = per_row<int64_t>(batch, "positions"),
        .num_logprobs = per_row<int32_t>(batch, "num_logprobs"),
        .repetition = per_row<float>(batch, "repetition"),
        .presence = per_row<float>(batch, "presence"),
        .frequency = per_row<float>(batch, "frequency"),
        .history = history.data(),
        .history_start = offsets(batch, "history_start", history.shape(0)),
        .history_outputs = per_row<int32_t>(batch, "history_outputs"),
        .bias_tokens = bias_tokens.data(),
        .bias_values = bias_values.data(),
        .bias_start = offsets(batch, "bias_start", bias_tokens.shape(0)),
        .masks = masks.data(),
        .mask_start = offsets(batch, "mask_start", masks.shape(0)),
    };
}

void bind_sampler(nb::module_& module) {
    module.def("sample", &sample, nb::arg("isa"), nb::arg("logits").noconvert(), nb::arg("batch"),
               nb::arg("tokens").noconvert(), nb::arg("logprobs").noconvert(), nb::arg("ranks").noconvert(),
               nb::arg("top_tokens").noconvert(), nb::arg("top_logprobs").noconvert());
    module.def("philox4x32", &philox4x32, nb::arg("counter"), nb::arg("key"));
}

}  // namespace octavo

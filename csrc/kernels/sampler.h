// Sampling: compute the next token from a row of raw logits. SamplingBatch in src/octavo/backends/base.py defines the
// result; sampler.cpp explains the method.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "scan.h"

namespace octavo {

// How to sample one row; the fields are those of SamplingBatch.
struct SamplingRow {
    float temperature;
    int32_t top_k;
    float top_p;
    float min_p;
    uint64_t seed;
    int64_t position;
    int32_t num_logprobs;
    float repetition;
    float presence;
    float frequency;
    const int32_t* history;  // prompt, then output
    int32_t history_length;
    int32_t history_outputs;
    const int32_t* bias_tokens;
    const float* bias_values;
    int32_t bias_length;
    const uint32_t* mask;  // bits of the allowed tokens
    int32_t mask_length;   // words; 0 if all tokens are allowed
};

// The arrays of a SamplingBatch, as passed from Python.
struct SamplingBatch {
    int32_t rows;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const uint64_t* seeds;
    const int64_t* positions;
    const int32_t* num_logprobs;
    const float* repetition;
    const float* presence;
    const float* frequency;
    const int32_t* history;
    const int32_t* history_start;
    const int32_t* history_outputs;
    const int32_t* bias_tokens;
    const float* bias_values;
    const int32_t* bias_start;
    const uint32_t* masks;
    const int32_t* mask_start;

    SamplingRow row(int32_t r) const;
    int32_t max_logprobs() const;  // K of StepResult; 0 or less if no row wants the likeliest tokens
};

// `token` is -1 if none can be drawn: a logit is NaN or +inf, or every token is banned. The engine then fails that
// request. `logprob` is NaN and `rank` 0 if there is no token, and if num_logprobs is -1.
struct SampledToken {
    int32_t token;
    float logprob;
    int32_t rank;
};

// A thread's working memory, allocated once: about 16 bytes per token of the vocabulary.
class SamplerScratch {
public:
    explicit SamplerScratch(int32_t vocab);

private:
    friend class RowSampler;
    struct Change {
        int32_t token;
        float logit;  // before the change
    };
    std::vector<float> values;
    std::vector<float> weights;
    std::vector<int32_t> tokens;
    std::vector<int32_t> seen;
    std::vector<float> lane_maxima;
    std::vector<double> chunk_sums;
    std::vector<Change> changes;
    std::vector<float> raw;  // the raw logits of a row that has a mask
};

// Sample one row. `logits` [vocab] are raw, and are overwritten. `top_tokens` and `top_logprobs` [top] receive the
// likeliest row.num_logprobs tokens in descending order, then -1 and NaN; both may be null if `top` is 0. The result
// depends only on the arguments, so any thread may sample any row, in any order.
SampledToken sample_row(float* logits, int32_t vocab, const SamplingRow& row, const Scan& scan, SamplerScratch& scratch,
                        int32_t* top_tokens, float* top_logprobs, int32_t top);

// The random number generator Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

}  // namespace octavo

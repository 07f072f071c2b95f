// Passes over a row of logits, the sampler's only heavy work, one implementation per instruction set (scan_kernels.h).
// All of them add in the same order.
#pragma once

#include <cstdint>

namespace octavo {

constexpr int32_t kScanLanes = 32;
constexpr int32_t kScanChunk = 64 * kScanLanes;  // summed in float; chunks are added up in double

struct Range {
    float max;
    bool damaged;  // a NaN or +inf is among the values
};

struct Scan {
    // The maximum of x [n], and those of the lanes of each chunk: of disjoint groups of at most 64 values.
    Range (*find_maxima)(const float* x, int32_t n, float* lane_maxima);
    // w = 2^((x - max) * scale), for max >= x and scale > 0, and 0 below 2^-126; the sums of its chunks, and their sum.
    double (*weigh)(const float* x, int32_t n, float max, float scale, float* w, double* chunk_sums);
    double (*sum_chunks)(const float* w, int32_t n, double* chunk_sums);
    // The sum of w where x >= threshold.
    double (*weight_from)(const float* x, const float* w, int32_t n, float threshold);
    // w = 0 where x < threshold; x may be w.
    void (*drop_below)(const float* x, int32_t n, float threshold, float* w);
    int32_t (*count_from)(const float* x, int32_t n, float threshold);   // x >= threshold
    int32_t (*count_above)(const float* x, int32_t n, float threshold);  // x > threshold
    // Copies the values >= threshold and their indices, in order, where there is room for all n; returns their number.
    int32_t (*gather)(const float* x, int32_t n, float threshold, float* values, int32_t* indices);
};

}  // namespace octavo

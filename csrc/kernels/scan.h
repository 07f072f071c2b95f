// Passes over a row of logits: the sampler's heavy work. Each instruction set has its own implementation
// (scan_kernels.h); all of them sum in the same order, so they return the same bits.
#pragma once

#include <cstdint>

namespace octavo {

constexpr int32_t kScanLanes = 32;
constexpr int32_t kScanChunk = 64 * kScanLanes;  // is summed in float; the sums of chunks are added in double

struct Range {
    float max;
    bool damaged;  // a NaN or +inf is among the values
};

struct Scan {
    // Return max(x [n]). lane_maxima [chunks][kScanLanes]: for each chunk and lane, the maximum of the lane's 64
    // values.
    Range (*find_maxima)(const float* x, int32_t n, float* lane_maxima);
    // w[i] = 2^((x[i] - max) * scale), or 0 below 2^-126. Return sum(w); chunk_sums [chunks] are the sums by chunk. max
    // >= x, scale > 0.
    double (*weigh)(const float* x, int32_t n, float max, float scale, float* w, double* chunk_sums);
    // Return sum(w [n]), and its sums by chunk.
    double (*sum_chunks)(const float* w, int32_t n, double* chunk_sums);
    // Return the sum of w[i] over all i with x[i] >= threshold.
    double (*weight_from)(const float* x, const float* w, int32_t n, float threshold);
    // w[i] = 0 wherever x[i] < threshold. x may be w.
    void (*drop_below)(const float* x, int32_t n, float threshold, float* w);
    // Return how many x[i] are >= threshold; > threshold.
    int32_t (*count_from)(const float* x, int32_t n, float threshold);
    int32_t (*count_above)(const float* x, int32_t n, float threshold);
    // Copy the values >= threshold and their indices, in order; return their number. Both outputs have room for n.
    int32_t (*gather)(const float* x, int32_t n, float threshold, float* values, int32_t* indices);
};

}  // namespace octavo

// The passes of scan.h. kScanLanes partial sums are kept in vector registers and added in a fixed order, so that the
// result does not depend on the instruction set.
#pragma once

#include "scan.h"
#include "simd.h"

namespace octavo::OCTAVO_ISA {

constexpr int32_t kParts = kScanLanes / kLanes;
constexpr float kInfinity = __builtin_inff();

// Return a pointer to the kScanLanes values from x[i] on; if they reach past the end n, to a copy in `padded` whose
// other values are `fill`.
OCTAVO_INLINE const float* stretch(const float* x, int32_t i, int32_t n, float fill, float* padded) {
    if (__builtin_expect(i + kScanLanes <= n, true)) return x + i;
    for (int32_t lane = 0; lane < kScanLanes; lane++) padded[lane] = i + lane < n ? x[i + lane] : fill;
    return padded;
}

OCTAVO_INLINE int32_t end_of_chunk(int32_t start, int32_t n) { return n - start < kScanChunk ? n : start + kScanChunk; }

// Return the sum of the lanes, added in one order.
OCTAVO_INLINE float sum_lanes(const F32* sums) {
    float lane[kScanLanes];
    std::memcpy(lane, sums, sizeof lane);
    for (int32_t width = kScanLanes / 2; width; width /= 2)
        for (int32_t i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

OCTAVO_INLINE int32_t sum_lanes(const I32* sums) {
    int32_t lane[kScanLanes], sum = 0;
    std::memcpy(lane, sums, sizeof lane);
    for (int32_t i = 0; i < kScanLanes; i++) sum += lane[i];
    return sum;
}

inline Range find_maxima(const float* x, int32_t n, float* lane_maxima) {
    float padded[kScanLanes];
    F32 largest[kParts];
    I32 sound[kParts];
    for (int32_t p = 0; p < kParts; p++) largest[p] = splat(-kInfinity), sound[p] = ~I32{};
    for (int32_t start = 0; start < n; start += kScanChunk) {
        F32 chunk[kParts];
        for (F32& lanes : chunk) lanes = splat(-kInfinity);
        for (int32_t i = start; i < end_of_chunk(start, n); i += kScanLanes) {
            const float* from = stretch(x, i, n, -kInfinity, padded);
            for (int32_t p = 0; p < kParts; p++) {
                const F32 v = load(from + p * kLanes);
                sound[p] &= v < splat(kInfinity);
                chunk[p] = max(v, chunk[p]);
            }
        }
        for (int32_t p = 0; p < kParts; p++) largest[p] = max(chunk[p], largest[p]);
        std::memcpy(lane_maxima + start / kScanChunk * kScanLanes, chunk, sizeof chunk);
    }
    Range range{-kInfinity, sum_lanes(sound) != -kScanLanes};
    for (const F32& lanes : largest) {
        const float candidate = maximum(lanes);
        range.max = candidate > range.max ? candidate : range.max;
    }
    return range;
}

inline double weigh(const float* x, int32_t n, float max, float scale, float* w, double* chunk_sums) {
    float padded[kScanLanes];
    double total = 0;
    for (int32_t start = 0; start < n; start += kScanChunk) {
        F32 sum[kParts] = {};
        for (int32_t i = start; i < end_of_chunk(start, n); i += kScanLanes) {
            const float* from = stretch(x, i, n, -kInfinity, padded);
            float* to = from == padded ? padded : w + i;
            for (int32_t p = 0; p < kParts; p++) {
                const F32 exponent = (load(from + p * kLanes) - splat(max)) * splat(scale);
                const F32 weight = (F32)((I32)exp2(exponent) & (exponent >= splat(-126.0f)));
                store(to + p * kLanes, weight);
                sum[p] += weight;
            }
            if (to == padded) std::memcpy(w + i, padded, (n - i) * sizeof(float));
        }
        total += chunk_sums[start / kScanChunk] = sum_lanes(sum);
    }
    return total;
}

inline double sum_chunks(const float* w, int32_t n, double* chunk_sums) {
    float padded[kScanLanes];
    double total = 0;
    for (int32_t start = 0; start < n; start += kScanChunk) {
        F32 sum[kParts] = {};
        for (int32_t i = start; i < end_of_chunk(start, n); i += kScanLanes) {
            const float* from = stretch(w, i, n, 0, padded);
            for (int32_t p = 0; p < kParts; p++) sum[p] += load(from + p * kLanes);
        }
        total += chunk_sums[start / kScanChunk] = sum_lanes(sum);
    }
    return total;
}

inline double weight_from(const float* x, const float* w, int32_t n, float threshold) {
    float padded_x[kScanLanes], padded_w[kScanLanes];
    double total = 0;
    for (int32_t start = 0; start < n; start += kScanChunk) {
        F32 sum[kParts] = {};
        for (int32_t i = start; i < end_of_chunk(start, n); i += kScanLanes) {
            const float *from_x = stretch(x, i, n, -kInfinity, padded_x), *from_w = stretch(w, i, n, 0, padded_w);
            for (int32_t p = 0; p < kParts; p++) {
                const I32 counts = load(from_x + p * kLanes) >= splat(threshold);
                sum[p] += (F32)((I32)load(from_w + p * kLanes) & counts);
            }
        }
        total += sum_lanes(sum);
    }
    return total;
}

inline void drop_below(const float* x, int32_t n, float threshold, float* w) {
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(w + i, (F32)((I32)load(w + i) & (I32)(load(x + i) >= splat(threshold))));
    for (; i < n; i++) w[i] = x[i] >= threshold ? w[i] : 0;
}

template <class Compare>
OCTAVO_INLINE int32_t count(const float* x, int32_t n, Compare compare) {
    float padded[kScanLanes];
    I32 counts[kParts] = {};
    for (int32_t i = 0; i < n; i += kScanLanes) {
        const float* from = stretch(x, i, n, __builtin_nanf(""), padded);
        for (int32_t p = 0; p < kParts; p++) counts[p] -= compare(load(from + p * kLanes));
    }
    return sum_lanes(counts);
}

inline int32_t count_from(const float* x, int32_t n, float threshold) {
    return count(x, n, [&](F32 v) -> I32 { return v >= splat(threshold); });
}

inline int32_t count_above(const float* x, int32_t n, float threshold) {
    return count(x, n, [&](F32 v) -> I32 { return v > splat(threshold); });
}

// Return whether any of kScanLanes values is >= threshold.
OCTAVO_INLINE bool any_from(const float* x, float threshold) {
    I32 any{};
    for (int32_t p = 0; p < kParts; p++) any |= load(x + p * kLanes) >= splat(threshold);
    uint64_t words[kLanes / 2], all = 0;
    std::memcpy(words, &any, sizeof any);
    for (uint64_t word : words) all |= word;
    return all != 0;
}

inline int32_t gather(const float* x, int32_t n, float threshold, float* values, int32_t* indices) {
    int32_t count = 0, i = 0;
#ifdef OCTAVO_AVX512
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + kLanes <= n; i += kLanes) {
        const __m512 v = _mm512_loadu_ps(x + i);
        const __mmask16 wanted = _mm512_cmp_ps_mask(v, _mm512_set1_ps(threshold), _CMP_GE_OQ);
        _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(wanted, v));
        const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(i));
        _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(wanted, places));
        count += __builtin_popcount(wanted);
    }
#endif
    while (i < n) {
        const int32_t end = n - i < kScanLanes ? n : i + kScanLanes;
        if (end - i == kScanLanes && !any_from(x + i, threshold)) {  // most often
            i = end;
            continue;
        }
        for (; i < end; i++) {
            values[count] = x[i];
            indices[count] = i;
            count += x[i] >= threshold;
        }
    }
    return count;
}

constexpr Scan kScan = {find_maxima, weigh, sum_chunks, weight_from, drop_below, count_from, count_above, gather};

}  // namespace octavo::OCTAVO_ISA

// The search for the scale, the minimum and the 4-bit integers that approximate a group of values best.
#pragma once

#include "kernels/simd.h"

namespace octavo::OCTAVO_ISA {

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// Rounds to half precision, ties to even; saturates at 65504.
OCTAVO_INLINE F32 round_to_half(F32 x) {
    x = x < 65504 ? x : splat(65504);
    x = x > -65504 ? x : splat(-65504);
    const U32 bits = (U32)x;
    const F32 normal = (F32)((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu);
    const F32 subnormal = (x + 0.75f) - 0.75f;  // a multiple of 2^-24, the last bit of 0.75
    return select(max(x, -x) < 0x1p-14f, subnormal, normal);
}

// Rounds to the nearest of 0 ... 15, and NaN to 0.
OCTAVO_INLINE F32 nearest_of_16(F32 x) {
    x = x > 0 ? x : zero();
    x = x < 15 ? x : splat(15);
    return (x + 0x1.8p23f) - 0x1.8p23f;
}

// The ranges from which a search starts: the values for q = 0 and q = 15, as fractions of the range from the group's
// lowest to its highest value.
constexpr float kRanges[][2] = {{0, 1}, {0, 0.97f}, {0.03f, 1}, {-0.07f, 1}, {-0.07f, 1.07f}};
constexpr int kIterations = 3;

// Minimizes sum(importance * (value - scale * q - minimum)^2) over q, scale and minimum, by alternating from each range:
// q = round((value - minimum) / scale), then scale and minimum by linear least squares for these q. Keeps the best of all
// iterations. Each row is computed in a lane of its own, so that no sum depends on the width of a vector.
void quantize_to_4(const float (*x)[kBlock], const float* importance, FourBits& result) {
    float whole = 0;
    for (int i = 0; i < kQuantGroup; i++) whole += importance[i];
    for (int lane = 0; lane < kBlock; lane += kLanes) {
        F32 v[kQuantGroup], lowest = load(x[0] + lane), highest = lowest, sum_x = zero();
        for (int i = 0; i < kQuantGroup; i++) {
            v[i] = load(x[i] + lane);
            lowest = v[i] < lowest ? v[i] : lowest;
            highest = max(v[i], highest);
            sum_x = sum_x + v[i] * importance[i];
        }
        const F32 mean_x = sum_x / whole;
        F32 least = splat(__builtin_inff()), best_scale = zero(), best_minimum = zero();
        for (const auto& [from, to] : kRanges) {
            F32 scale = (highest - lowest) * ((to - from) / 15), minimum = lowest + (highest - lowest) * from;
            for (int iteration = 0; iteration < kIterations; iteration++) {
                scale = round_to_half(scale), minimum = round_to_half(minimum);
                const F32 back = select(scale == 0, zero(), splat(1) / scale);
                F32 error = zero(), sum_q = zero(), sum_qq = zero(), sum_qx = zero();
    OCTAVO_UNROLL for (int i = 0; i < kQuantGroup; i++) {
                    const F32 q = nearest_of_16((v[i] - minimum) * back), weighted = q * importance[i];
                    const F32 difference = v[i] - (scale * q + minimum);
                    error = error + difference * difference * importance[i];
                    sum_q = sum_q + weighted, sum_qq = sum_qq + weighted * q, sum_qx = sum_qx + weighted * v[i];
                }
                const auto better = error < least;
                least = select(better, error, least);
                best_scale = select(better, scale, best_scale), best_minimum = select(better, minimum, best_minimum);
                const F32 mean_q = sum_q / whole, variance = sum_qq - sum_q * mean_q;
                scale = (sum_qx - sum_q * mean_x) / select(variance > 0, variance, splat(1));
                minimum = mean_x - scale * mean_q;
            }
        }
        store(result.scale + lane, best_scale), store(result.minimum + lane, best_minimum);
        const F32 back = select(best_scale == 0, zero(), splat(1) / best_scale);
        for (int i = 0; i < kQuantGroup; i++) {
            const F32 q = nearest_of_16((v[i] - best_minimum) * back);
            store_as(result.q[i] + lane, __builtin_convertvector(__builtin_convertvector(q, I32), Bytes));
        }
    }
}

}  // namespace octavo::OCTAVO_ISA

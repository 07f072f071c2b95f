// The rotation of rows that are stored in int8 with one scale (QuaRot: Ashkboos et al., 2024).
//
// A row x is replaced by H x, where H is orthogonal, made of Walsh-Hadamard transforms. (H x) . (H w) = x . w, so
// products of activations and weights stay the same if both are rotated. But an outlier of x, which would set the scale
// of its row and so the rounding error of all other values, is spread over many columns.
#pragma once

#include "kernels.h"

namespace octavo {

// Transform n values across blocks of 64: n is 64 times a power of two, and value i of each block is combined with
// value i of the others. (a, b) -> ((a + b), (a - b)) / sqrt(2) at each level. The sums are the same, to the bit, for
// any vector type F.
template <class F>
OCTAVO_INLINE void mix_blocks(float* row, int64_t n) {
    typedef F Unaligned __attribute__((aligned(4), may_alias));
    const auto at = [row](int64_t i) -> Unaligned& { return *reinterpret_cast<Unaligned*>(row + i); };
    for (int64_t step = kRotated; step < n; step *= 2)
        for (int64_t start = 0; start < n; start += 2 * step)
            for (int64_t i = start; i < start + step; i += int64_t(sizeof(F) / sizeof(float))) {
                const F a = at(i), b = at(i + step);
                at(i) = (a + b) * 0.70710678118654752f, at(i + step) = (a - b) * 0.70710678118654752f;
            }
}

// Return v with lanes i and i ^ bit exchanged. `lane` holds 0, 1, 2 ...
template <class F, class I>
OCTAVO_INLINE F swap_lanes(F v, I lane, int bit) {
#ifdef __clang__  // has no shuffle by a vector of indices, but compiles this loop to one
    F swapped = v;
#pragma GCC unroll 16
    for (int i = 0; i < int(sizeof(F) / sizeof(float)); i++) swapped[i] = v[lane[i] ^ bit];
    return swapped;
#else
    return __builtin_shuffle(v, lane ^ bit);
#endif
}

// Transform the 64 values of a block: block = H64 block / 8. I: a vector of as many integers as F has floats.
template <class F, class I>
OCTAVO_INLINE void mix_block(float* block) {
    typedef F Unaligned __attribute__((aligned(4), may_alias));
    constexpr int kLanes = sizeof(F) / sizeof(float), kVectors = kRotated / kLanes;
    const auto at = [block](int64_t i) -> Unaligned& { return *reinterpret_cast<Unaligned*>(block + i); };
    I lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    F v[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) v[i] = at(i * kLanes);
#pragma GCC unroll 4
    for (int bit = 1; bit < kLanes; bit *= 2) {
        const F sign = (lane & bit) == 0 ? F{} + 1.0f : F{} - 1.0f;
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; i++) v[i] = v[i] * sign + swap_lanes<F, I>(v[i], lane, bit);
    }
#pragma GCC unroll 4
    for (int step = 1; step < kVectors; step *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; i++) {
            if (i & step) continue;
            const F a = v[i], b = v[i + step];
            v[i] = a + b, v[i + step] = a - b;
        }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) at(i * kLanes) = v[i] * 0.125f;
}

// Rotate a row of n values, a multiple of 64. If the number of blocks is not a power of two, the largest power of two
// of them is transformed at the row's beginning, then as many at its end. `back`: the inverse. Each transform is its
// own inverse, and those within blocks commute with those across blocks, so only the order of the last two is reversed.
template <class F, class I>
OCTAVO_INLINE void rotate(float* row, int64_t n, bool back = false) {
    for (int64_t i = 0; i < n; i += kRotated) mix_block<F, I>(row + i);
    int64_t most = kRotated;
    while (2 * most <= n) most *= 2;
    const int64_t first = back ? n - most : 0;
    mix_blocks<F>(row + first, most);
    if (most < n) mix_blocks<F>(row + n - most - first, most);
}

}  // namespace octavo

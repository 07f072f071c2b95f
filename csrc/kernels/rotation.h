// The rotation of rows that are held in int8 with one scale: Walsh-Hadamard transforms, which are orthogonal. Rotated
// alike, a row of activations and a row of a weight have the same product; but a value far above the others, of which
// activations have some, is now spread over many and no longer spoils the scale (QuaRot: Ashkboos et al., 2024).
#pragma once

#include "kernels.h"

namespace octavo {

// Walsh-Hadamard over blocks of 64 values, of which there is a power of two: the same sums and differences, and so the
// same bits, with vectors F of any size.
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

// v with lanes i and i ^ bit exchanged; `lane` holds 0, 1, 2 ...
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

// The same within a block. I: integers in the shape of F.
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

// A row of n values, a multiple of 64. Where its blocks are no power of two, as many as are one are mixed from the left,
// then from the right. `back` undoes it: mixing is its own inverse, and within blocks or across may come first.
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

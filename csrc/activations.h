// Writing the rows that linears read: as bf16, or as int8 in groups of 32 that have a scale each.
#pragma once

#include "simd.h"

namespace octavo::OCTAVO_ISA {

constexpr int kGroupVectors = int(kQuantGroup) / kLanes;

// To the nearest of -127 ... 127, of which the largest magnitude of the group gets one.
OCTAVO_INLINE void quantise_group(const F32* values, int8_t* to, ActivationGroup& group) {
    typedef int8_t I8 __attribute__((vector_size(kLanes)));
    I32 bits = {};  // of the magnitude; as an integer, NaN is larger than anything else, and so becomes the scale
    OCTAVO_UNROLL for (int i = 0; i < kGroupVectors; i++) {
        const I32 magnitude = (I32)values[i] & 0x7fffffff;
        bits = bits > magnitude ? bits : magnitude;
    }
    const int32_t largest_bits = maximum(bits);
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    const F32 back = splat(largest > 0 ? 127.0f / largest : 0.0f), magic = splat(12582912.0f);  // as in exp2
    I32 halves[2] = {};
    OCTAVO_UNROLL for (int i = 0; i < kGroupVectors; i++) {
        const I32 q = (I32)(values[i] * back + magic) - (I32)magic;
        store_as<I8>(to + i * kLanes, __builtin_convertvector(q, I8));
        halves[i / (kGroupVectors / 2)] += q;
    }
    const int32_t first = sum(halves[0]), total = first + sum(halves[1]);
    const float scale = largest / 127.0f;
    group = {scale, scale * float(total), -128 * total, -128 * first};
}

// 32 values of a row, from a column that is a multiple of 32 on.
OCTAVO_INLINE void store_group(const Matrix& out, int64_t row, int64_t column, const F32* values) {
    if (out.quantised)
        return quantise_group(values, out.i8(row) + column, out.groups(row)[column / kQuantGroup]);
    OCTAVO_UNROLL for (int i = 0; i < kGroupVectors; i++)
        store_bf16(out.b16(row) + column + i * kLanes, values[i]);
}

}  // namespace octavo::OCTAVO_ISA

// Writing a row x [columns] of activations in the form that the next linear reads (Element):
//
//   bf16       round(x)
//   i8_groups  for each group of 32 columns: s = max|x| / 127, q = round(x / s)
//   i8_rows    for each span (kernels.h): y = rotate(x) (rotation.h); s = max|y| / 127, q = round(y / s)
#pragma once

#include "rotation.h"
#include "simd.h"

namespace octavo::OCTAVO_ISA {

constexpr int kGroupVectors = int(kQuantGroup) / kLanes;

// Return max(|values|, so_far) by lane, as bits. They are compared as integers, where NaN is larger than any number, so
// a NaN becomes the scale and is not lost.
OCTAVO_INLINE I32 magnitude_bits(F32 values, I32 so_far) {
    const I32 magnitude = (I32)values & 0x7fffffff;
    return so_far > magnitude ? so_far : magnitude;
}

struct Int8Scale {
    float scale, back;

    OCTAVO_INLINE explicit Int8Scale(I32 bits) {
        const int32_t largest_bits = maximum(bits);
        float largest;
        std::memcpy(&largest, &largest_bits, sizeof largest);
        scale = largest / 127.0f, back = largest > 0 ? 127.0f / largest : 0.0f;
    }
};

// Store round(values * back), which is in -127 ... 127; return it as well.
OCTAVO_INLINE I32 store_int8(F32 values, float back, int8_t* to) {
    typedef int8_t I8 __attribute__((vector_size(kLanes)));
    const F32 magic = splat(12582912.0f);  // as in exp2
    const I32 q = (I32)(values * splat(back) + magic) - (I32)magic;
    store_as<I8>(to, __builtin_convertvector(q, I8));
    return q;
}

// Write 32 values as int8, with the scale and the sums of their group.
OCTAVO_INLINE void quantize_group(const F32* values, int8_t* to, ActivationGroup& group) {
    I32 bits = {}, halves[2] = {};
    OCTAVO_UNROLL for (int i = 0; i < kGroupVectors; i++) bits = magnitude_bits(values[i], bits);
    const Int8Scale s(bits);
    OCTAVO_UNROLL for (int i = 0; i < kGroupVectors; i++)
        halves[i / (kGroupVectors / 2)] += store_int8(values[i], s.back, to + i * kLanes);
    const int32_t first = sum(halves[0]), total = first + sum(halves[1]);
    group = {s.scale, s.scale * float(total), -128 * total, -128 * first};
}

// Write 32 values of a row as bf16 or as a group of int8, from `column`, a multiple of 32, on.
OCTAVO_INLINE void store_group(const Matrix& out, int64_t row, int64_t column, const F32* values) {
    if (out.element == Element::i8_groups)
        return quantize_group(values, out.i8(row) + column, out.groups(row)[column / kQuantGroup]);
    OCTAVO_UNROLL for (int i = 0; i < kGroupVectors; i++)
        store_bf16(out.b16(row) + column + i * kLanes, values[i]);
}

// Write a row as i8_rows. Overwrites `values`, which has out.stride floats.
OCTAVO_INLINE void store_rotated(const Matrix& out, int64_t row, float* values) {
    for (int64_t span = 0; span < out.spans.count; span++) {
        const int64_t begin = out.spans.begin(span) * kQuantGroup, end = out.spans.ends[span] * kQuantGroup;
        rotate<F32, I32>(values + begin, end - begin);
        I32 bits = {}, total = {};
        for (int64_t i = begin; i < end; i += kLanes) bits = magnitude_bits(load(values + i), bits);
        const Int8Scale s(bits);
        for (int64_t i = begin; i < end; i += kLanes)
            total += store_int8(load(values + i), s.back, out.i8(row) + i);
        out.row_scales(row)[span] = {s.scale, -128 * sum(total)};
    }
}

// Write a row in the form of `out`. value_at(column) returns a vector of values; `scratch` has room for the row.
template <class Values>
OCTAVO_INLINE void write_row(const Matrix& out, int64_t row, Values value_at, float* scratch) {
    if (out.element == Element::i8_rows) {
        for (int64_t i = 0; i < out.stride; i += kLanes) store(scratch + i, value_at(i));
        return store_rotated(out, row, scratch);
    }
    for (int64_t i = 0; i < out.stride; i += kQuantGroup) {
        F32 values[kGroupVectors];
        OCTAVO_UNROLL for (int j = 0; j < kGroupVectors; j++) values[j] = value_at(i + j * kLanes);
        store_group(out, row, i, values);
    }
}

}  // namespace octavo::OCTAVO_ISA

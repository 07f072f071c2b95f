// The product of int8 activations and a weight of 8-bit or 4-bit integers.
//
// A group of 32 values is summed up exactly, in integers, and scaled into a float accumulator, of which each element of
// the result has one. It takes the groups in ascending order, however many rows are worked on together, so a row comes
// out the same, to the bit, in any batch.
#pragma once

#include <utility>

#include "activations.h"

namespace octavo::OCTAVO_ISA {

#if defined(OCTAVO_AVX512)
constexpr int kIntegerRows = 8;
#elif defined(OCTAVO_AVX2)
constexpr int kIntegerRows = 4;
#else
constexpr int kIntegerRows = 2;
#endif

// The scales or minima of 16 rows.
template <Encoding kEncoding>
OCTAVO_INLINE void load_scales(const std::byte* from, F32 (&to)[kVectors]) {
    OCTAVO_UNROLL for (int v = 0; v < kVectors; v++) {
        if constexpr (kEncoding.wide)
            to[v] = load(reinterpret_cast<const float*>(from) + v * kLanes);
        else
            to[v] = from_half(reinterpret_cast<const uint16_t*>(from) + v * kLanes);
    }
}

// What an integer sum begins with, in every lane, so that it is as if a weight without minima were signed.
template <Encoding kEncoding>
OCTAVO_INLINE I32 first_sum(const ActivationGroup& group, int part) {
    if constexpr (kEncoding.minimum) return I32{};
    const int32_t offset = kEncoding.scales == 1 ? group.offset : part ? group.offset - group.half_offset : group.half_offset;
    return kEncoding.bits == 8 ? offset - I32{} : (offset - I32{}) >> 4;
}

template <Encoding kEncoding>
OCTAVO_INLINE float scaled_sum(const ActivationGroup& group, int part) {
    if constexpr (kEncoding.scales == 1) return group.scaled_sum;
    const int32_t offset = part ? group.offset - group.half_offset : group.half_offset;
    return group.scale * (float(offset) * -0x1p-7f);
}

using IntegerTile = void (*)(const Matrix& a, int64_t row, const Weight& weight, int64_t block, float* c,
                             int64_t c_stride, Ahead ahead, int64_t ahead_rate);

// kRows rows times one block of the weight.
template <Encoding kEncoding, int kRows>
void integer_tile(const Matrix& a, int64_t row, const Weight& weight, int64_t block, float* c, int64_t c_stride,
                  Ahead ahead, int64_t ahead_rate) {
    constexpr int kWords = int(kQuantGroup) / 4 / kEncoding.scales;  // of four values, that share a scale
    constexpr int64_t kScaleBytes = kEncoding.scale_bytes() / (kEncoding.scales * (kEncoding.minimum ? 2 : 1));
    const std::byte* values = weight.block(block);
    const std::byte* scales = values + weight.groups * kEncoding.value_bytes();
    const int8_t* rows = a.i8(row);
    const int64_t row_bytes = Matrix::quantised_bytes(a.stride);
    F32 sums[kRows][kVectors] = {};
    for (int64_t g = 0; g < weight.groups; g++) {
        for (int64_t i = 0; i < ahead_rate && ahead.at < ahead.end; i++, ahead.at += 64)
            __builtin_prefetch(ahead.at, 0, 2);
        const auto group = [&](int r) -> const ActivationGroup& {
            return reinterpret_cast<const ActivationGroup*>(rows + r * row_bytes + a.stride)[g];
        };
        OCTAVO_UNROLL for (int part = 0; part < kEncoding.scales; part++) {
            I32 dots[kRows][kVectors];
            OCTAVO_UNROLL for (int r = 0; r < kRows; r++)
                OCTAVO_UNROLL for (int v = 0; v < kVectors; v++) dots[r][v] = first_sum<kEncoding>(group(r), part);
            OCTAVO_UNROLL for (int word = 0; word < kWords * kEncoding.bits / 8; word++) {
                U32 stored[kVectors];
                OCTAVO_UNROLL for (int v = 0; v < kVectors; v++)
                    stored[v] = load_as<U32>(values + ((part * kWords + word) * kVectors + v) * sizeof(U32));
                OCTAVO_UNROLL for (int half = 0; half < 8 / kEncoding.bits; half++) {
                    const int64_t column = g * kQuantGroup + 4 * (part * kWords + word + half * 4);
                    OCTAVO_UNROLL for (int r = 0; r < kRows; r++) {
                        const U32 activations = splat_word(rows + r * row_bytes + column);
                        OCTAVO_UNROLL for (int v = 0; v < kVectors; v++) {
                            const U32 integers = kEncoding.bits == 8 ? stored[v] : stored[v] >> (4 * half) & 0x0f0f0f0f;
                            dots[r][v] = dot4(dots[r][v], integers, activations);
                        }
                    }
                }
            }
            F32 scale[kVectors], minimum[kVectors];
            load_scales<kEncoding>(scales + part * kScaleBytes, scale);
            if constexpr (kEncoding.minimum)
                load_scales<kEncoding>(scales + (kEncoding.scales + part) * kScaleBytes, minimum);
            OCTAVO_UNROLL for (int r = 0; r < kRows; r++)
                OCTAVO_UNROLL for (int v = 0; v < kVectors; v++) {
                    sums[r][v] = fma(to_float(dots[r][v]), scale[v] * splat(group(r).scale), sums[r][v]);
                    if constexpr (kEncoding.minimum)
                        sums[r][v] = fma(minimum[v], splat(scaled_sum<kEncoding>(group(r), part)), sums[r][v]);
                }
        }
        values += kEncoding.value_bytes();
        scales += kEncoding.scale_bytes();
    }
    OCTAVO_UNROLL for (int r = 0; r < kRows; r++)
        OCTAVO_UNROLL for (int v = 0; v < kVectors; v++) store(c + r * c_stride + v * kLanes, sums[r][v]);
}

// The encodings there are, by number: see Encoding::joined.
constexpr int kEncodings = 16;

OCTAVO_INLINE constexpr int number_of(Encoding e) { return (e.bits == 8) * 8 + (e.scales == 2) * 4 + e.minimum * 2 + e.wide; }

constexpr Encoding encoding_number(int n) { return {n & 8 ? 8 : 4, n & 4 ? 2 : 1, bool(n & 2), bool(n & 1)}; }

template <int kNumber, int kRows>
constexpr IntegerTile integer_tile_or_null() {
    constexpr Encoding kEncoding = encoding_number(kNumber);
    if constexpr (kEncoding.joined(kEncoding) == kEncoding) return integer_tile<kEncoding, kRows>;
    return nullptr;
}

struct IntegerTileTable {
    IntegerTile tile[kEncodings * kIntegerRows];
};

template <int... kIndex>
constexpr IntegerTileTable make_integer_tiles(std::integer_sequence<int, kIndex...>) {
    return {{integer_tile_or_null<kIndex / kIntegerRows, kIndex % kIntegerRows + 1>()...}};
}

constexpr IntegerTileTable kIntegerTiles = make_integer_tiles(std::make_integer_sequence<int, kEncodings * kIntegerRows>());

// c [rows, 16 blocks] = a [rows ...] times blocks of the weight, from `row` and `block` on.
OCTAVO_INLINE void integer_product(const Matrix& a, int64_t row, int64_t rows, const Weight& weight, int64_t block,
                                   int64_t blocks, float* c, int64_t c_stride, Ahead ahead) {
    const IntegerTile* tiles = kIntegerTiles.tile + number_of(weight.encoding) * kIntegerRows;
    const int64_t steps = blocks * ((rows + kIntegerRows - 1) / kIntegerRows) * weight.groups;
    const int64_t rate = ((ahead.end - ahead.at) / 64 + steps - 1) / steps;
    for (int64_t j = 0; j < blocks; j++)
        for (int64_t r = 0, height; r < rows; r += height) {
            height = even_step(rows - r, kIntegerRows);
            tiles[height - 1](a, row + r, weight, block + j, c + r * c_stride + j * kBlock, c_stride, ahead, rate);
            ahead.at += rate * weight.groups * 64;
        }
}

// A group of the weight's row 16 * block + lane, as 32 floats.
OCTAVO_INLINE void read_weight_group(const Weight& weight, int64_t block, int64_t lane, int64_t group, float* to) {
    const Encoding& e = weight.encoding;
    const std::byte* values = weight.block(block) + group * e.value_bytes();
    const std::byte* scales = weight.block(block) + weight.groups * e.value_bytes() + group * e.scale_bytes();
    const auto scale_at = [&](int64_t line) {
        if (e.wide) return reinterpret_cast<const float*>(scales)[line * kBlock + lane];
        float lanes[kLanes];
        store(lanes, from_half(reinterpret_cast<const uint16_t*>(scales) + line * kBlock + lane / kLanes * kLanes));
        return lanes[lane % kLanes];
    };
    for (int part = 0; part < 2; part++) {
        const float scale = scale_at(e.scales == 2 ? part : 0);
        const float minimum = e.minimum ? scale_at(e.scales == 2 ? 2 + part : 1) : 0;
        for (int i = part * 16; i < part * 16 + 16; i++) {
            const int word = e.bits == 8 ? i / 4 : i / 4 % 4, stored = int(values[(word * kBlock + lane) * 4 + i % 4]);
            const int q = e.bits == 8 ? stored : stored >> (4 * part) & 15;
            to[i] = e.minimum ? scale * float(q) + minimum : scale * float(q - e.zero());
        }
    }
}

}  // namespace octavo::OCTAVO_ISA

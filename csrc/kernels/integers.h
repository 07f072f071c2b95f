// The product of int8 activations x and a weight w of 8-bit or 4-bit integers, both scaled in groups g of 32 columns:
//
//   x[r, k] = s[r, g] * p[r, k]              p: int8
//   w[j, k] = t[j, g] * q[j, k] + m[j, g]    q: uint8 or 4 bits; without minima, m = -zero * t
//   c[r, j] = sum over g of  t[j, g] * s[r, g] * (sum over k in g of p[r, k] * q[j, k])
//                            + m[j, g] * s[r, g] * (sum over k in g of p[r, k])
//
// The sum within a group is exact, in int32. In a span (Spans in kernels.h), c[r, j] has one float accumulator, which
// takes the groups in ascending order whatever the number of rows computed together; the sums of spans are added in a
// tree. So a row has the same bits in any batch. Where the halves of a group have scales of their own (Encoding::scales
// is 2), each half, or "part", is summed and scaled separately.
#pragma once

#include <utility>

#include "activations.h"

namespace octavo::OCTAVO_ISA {

// Load vector `index` of a line: 16 scales, or 16 minima.
template <Encoding kEncoding>
OCTAVO_INLINE F32 load_scale(const std::byte* lines, int line, int index) {
    lines += line * kEncoding.line_bytes();
    if constexpr (kEncoding.wide) return load(reinterpret_cast<const float*>(lines) + index * kLanes);
    return from_half(reinterpret_cast<const uint16_t*>(lines) + index * kLanes);
}

// Return the initial value of an integer sum: -zero * sum(p) for a weight without minima, as if its q were signed; else
// 0.
template <Encoding kEncoding>
OCTAVO_INLINE I32 first_sum(const ActivationGroup& group, int part) {
    if constexpr (kEncoding.minimum) return I32{};
    const int32_t offset = kEncoding.parts() == 1 ? group.offset
                           : part                 ? group.offset - group.half_offset
                                                  : group.half_offset;
    return kEncoding.bits == 8 ? offset - I32{} : (offset - I32{}) >> 4;
}

// Return s * sum(p) of a group's part.
template <Encoding kEncoding>
OCTAVO_INLINE float scaled_sum(const ActivationGroup& group, int part) {
    if constexpr (kEncoding.parts() == 1) return group.scaled_sum;
    const int32_t offset = part ? group.offset - group.half_offset : group.half_offset;
    return group.scale * (float(offset) * -0x1p-7f);
}

// Return sum + the scaled contribution of a group's part; `dots` is its integer sum.
template <Encoding kEncoding>
OCTAVO_INLINE F32 add_scaled(F32 sum, I32 dots, const ActivationGroup& group, int part, F32 scale, F32 minimum) {
    sum = fma(to_float(dots), scale * splat(group.scale), sum);
    return kEncoding.minimum ? fma(minimum, splat(scaled_sum<kEncoding>(group, part)), sum) : sum;
}

// Adds the sums of spans in their tree, as a binary counter counts: a sum waits until the subtree to its right is done.
template <int kSums>
struct SpanTree {
    F32 waiting[3][kSums];

    // Take the sums of the next span. Afterwards `sums` are zero, or those of all spans if it was the last one.
    OCTAVO_INLINE void add(const Spans& spans, int64_t span, F32* sums) {
        int level = 0;
        for (; span >> level & 1; level++) add_all(waiting[level], sums);
        if (span + 1 == spans.count) return;
        OCTAVO_UNROLL for (int i = 0; i < kSums; i++) waiting[level][i] = sums[i], sums[i] = zero();
    }

    OCTAVO_INLINE static void add_all(const F32* earlier, F32* sums) {
        OCTAVO_UNROLL for (int i = 0; i < kSums; i++) sums[i] = earlier[i] + sums[i];
    }
};

using IntegerTile = void (*)(const Matrix& a, int64_t row, const Weight& weight, int64_t block, float* c,
                             int64_t c_stride, Ahead ahead, int64_t ahead_rate);

// Compute a tile of c: kRows rows times kBlocks blocks of the weight.
template <Encoding kEncoding, int kRows, int kBlocks>
void integer_tile(const Matrix& a, int64_t row, const Weight& weight, int64_t block, float* c, int64_t c_stride,
                  Ahead ahead, int64_t ahead_rate) {
    constexpr int kColumns = kBlocks * kVectors;
    constexpr int kParts = kEncoding.parts(), kWords = int(kQuantGroup) / 4 / kParts;  // a word is four values
    const std::byte* values = weight.block(block);
    const std::byte* scales = values + weight.groups * kEncoding.value_bytes();
    const int8_t* rows = a.i8(row);
    const int64_t row_bytes = a.row_bytes, block_bytes = weight.block_bytes;
    F32 sums[kRows][kColumns] = {};
    SpanTree<kRows * kColumns> tree;
    int64_t span = 0;
    for (int64_t g = 0; g < weight.groups; g++) {
        ahead.next(ahead_rate * 64).prefetch();
        const auto group = [&](int r) -> const ActivationGroup& {
            return reinterpret_cast<const ActivationGroup*>(rows + r * row_bytes + a.stride)[g];
        };
    // clang-format off: it would unindent this line
        OCTAVO_UNROLL for (int part = 0; part < kParts; part++) {
            // clang-format on
            I32 dots[kRows][kColumns];
            OCTAVO_UNROLL for (int r = 0; r < kRows; r++)
                OCTAVO_UNROLL for (int j = 0; j < kColumns; j++) dots[r][j] = first_sum<kEncoding>(group(r), part);
            OCTAVO_UNROLL for (int word = 0; word < kWords * kEncoding.bits / 8; word++) {
                U32 stored[kColumns];
                OCTAVO_UNROLL for (int j = 0; j < kColumns; j++) {
                    const int64_t at = ((part * kWords + word) * kVectors + j % kVectors) * sizeof(U32);
                    stored[j] = load_as<U32>(values + j / kVectors * block_bytes + at);
                }
                OCTAVO_UNROLL for (int half = 0; half < 8 / kEncoding.bits; half++) {
                    const int64_t column = g * kQuantGroup + 4 * (part * kWords + word + half * 4);
                    U32 integers[kColumns];
                    OCTAVO_UNROLL for (int j = 0; j < kColumns; j++)
                        integers[j] = kEncoding.bits == 8 ? stored[j] : stored[j] >> (4 * half) & 0x0f0f0f0f;
                    OCTAVO_UNROLL for (int r = 0; r < kRows; r++) {
                        const U32 activations = splat_word(rows + r * row_bytes + column);
                        OCTAVO_UNROLL for (int j = 0; j < kColumns; j++)
                            dots[r][j] = dot4(dots[r][j], integers[j], activations);
                    }
                }
            }
            OCTAVO_UNROLL for (int j = 0; j < kColumns; j++) {
                const std::byte* lines = scales + j / kVectors * block_bytes;
                const F32 scale = load_scale<kEncoding>(lines, part, j % kVectors);
                F32 minimum = {};
                if constexpr (kEncoding.minimum) minimum = load_scale<kEncoding>(lines, kParts + part, j % kVectors);
                OCTAVO_UNROLL for (int r = 0; r < kRows; r++)
                    sums[r][j] = add_scaled<kEncoding>(sums[r][j], dots[r][j], group(r), part, scale, minimum);
            }
        }
        values += kEncoding.value_bytes();
        scales += kEncoding.scale_bytes();
        if (g + 1 == weight.spans.ends[span]) tree.add(weight.spans, span++, sums[0]);
    }
    OCTAVO_UNROLL for (int j = 0; j < kColumns; j++)
        OCTAVO_UNROLL for (int r = 0; r < kRows; r++) store(c + r * c_stride + j * kLanes, sums[r][j]);
}

// The largest tile. Registers hold two sums, the integer one and the float one, for each row and vector of columns.
#if defined(OCTAVO_AVX512)
constexpr int kIntegerRows = 6, kIntegerBlocks = 2;
#elif defined(OCTAVO_AVX2)
constexpr int kIntegerRows = 4, kIntegerBlocks = 1;
#else
constexpr int kIntegerRows = 2, kIntegerBlocks = 1;
#endif
constexpr int kIntegerShapes = kIntegerRows * kIntegerBlocks;

constexpr int kEncodings = 16;  // encodings in groups, by number_of()

constexpr int number_of(Encoding e) { return (e.bits == 8) * 8 + (e.scales - 1) * 4 + e.minimum * 2 + e.wide; }

constexpr Encoding encoding_number(int n) { return {n < 8 ? 4 : 8, n / 4 % 2 + 1, bool(n & 2), bool(n & 1)}; }

constexpr bool exists(Encoding e) { return e.joined(e) == e; }

template <int kNumber, int kShape>
constexpr IntegerTile integer_tile_or_null() {
    constexpr Encoding kEncoding = encoding_number(kNumber);
    if constexpr (exists(kEncoding))
        return integer_tile<kEncoding, kShape / kIntegerBlocks + 1, kShape % kIntegerBlocks + 1>;
    return nullptr;
}

struct IntegerTileTable {
    IntegerTile tile[kEncodings * kIntegerShapes];
};

template <int... kIndex>
constexpr IntegerTileTable make_integer_tiles(std::integer_sequence<int, kIndex...>) {
    return {{integer_tile_or_null<kIndex / kIntegerShapes, kIndex % kIntegerShapes>()...}};
}

constexpr IntegerTileTable kIntegerTiles =
    make_integer_tiles(std::make_integer_sequence<int, kEncodings * kIntegerShapes>());

// c [rows, 16 * blocks] = a[row : row + rows] * weight[block : block + blocks] transposed. The stride of c is in
// elements.
OCTAVO_INLINE void integer_product(const Matrix& a, int64_t row, int64_t rows, const Weight& weight, int64_t block,
                                   int64_t blocks, float* c, int64_t c_stride, Ahead ahead) {
    const IntegerTile* tiles = kIntegerTiles.tile + number_of(weight.encoding) * kIntegerShapes;
    const int64_t widest = rows == 1 ? 1 : kIntegerBlocks;  // one row: reads the weight sequentially
    const int64_t count = (blocks + widest - 1) / widest * ((rows + kIntegerRows - 1) / kIntegerRows);
    const int64_t rate = ((ahead.end - ahead.at) / 64 + count * weight.groups - 1) / (count * weight.groups);
    for (int64_t j = 0, width; j < blocks; j += width) {
        width = even_step(blocks - j, widest);
        for (int64_t r = 0, height; r < rows; r += height) {
            height = even_step(rows - r, kIntegerRows);
            const auto tile = tiles[(height - 1) * kIntegerBlocks + width - 1];
            tile(a, row + r, weight, block + j, c + r * c_stride + j * kBlock, c_stride, ahead, rate);
            ahead.at += rate * weight.groups * 64;
        }
    }
}

// Decode one group of the weight's row 16 * block + lane into 32 floats.
OCTAVO_INLINE void read_weight_group(const Weight& weight, int64_t block, int64_t lane, int64_t group, float* to) {
    const Encoding& e = weight.encoding;
    const std::byte* values = weight.block(block) + group * e.value_bytes();
    const std::byte* lines = weight.block(block) + weight.groups * e.value_bytes() + group * e.scale_bytes();
    const auto scale_at = [&](int64_t line) {
        if (e.wide) return reinterpret_cast<const float*>(lines)[line * kBlock + lane];
        float lanes[kLanes];
        store(lanes, from_half(reinterpret_cast<const uint16_t*>(lines) + line * kBlock + lane / kLanes * kLanes));
        return lanes[lane % kLanes];
    };
    for (int part = 0; part < 2; part++) {
        const int line = e.parts() == 2 ? part : 0;
        const float scale = scale_at(line), minimum = e.minimum ? scale_at(e.parts() + line) : 0;
        for (int i = part * 16; i < part * 16 + 16; i++) {
            const int word = e.bits == 8 ? i / 4 : i / 4 % 4, stored = int(values[(word * kBlock + lane) * 4 + i % 4]);
            const int q = e.bits == 8 ? stored : stored >> (4 * part) & 15;
            to[i] = e.minimum ? scale * float(q) + minimum : scale * float(q - e.zero());
        }
    }
}

}  // namespace octavo::OCTAVO_ISA

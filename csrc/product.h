// The one inner loop of linears and of attention: rows of bf16 times a matrix stored as pairs, summed in float.
//
// Each element of the result has one accumulator, which takes the pairs in ascending order. It does not matter how many
// rows and columns are worked on together, so a row comes out the same, to the bit, in any batch.
//
// What keeps a product from waiting for its operands is that they were fetched, as `ahead`, during the one before.
#pragma once

#include <utility>

#include "simd.h"

namespace octavo::OCTAVO_ISA {

constexpr int64_t kSumsStride = kMaxPanel * kBlock;  // of the sums of a linear

// The right operand: 16 columns of pair p, block j are at data + p * pair + j * block (in bf16).
struct Pairs {
    const bf16* data;
    int64_t pair, block;
};

using Tile = void (*)(const bf16* a, int64_t a_stride, Pairs b, int64_t pairs, bool add, float* c, int64_t c_stride,
                      Ahead ahead, int64_t ahead_rate);

template <int kRows, int kBlocks>
void product_tile(const bf16* a, int64_t a_stride, Pairs b, int64_t pairs, bool add, float* c, int64_t c_stride,
                  Ahead ahead, int64_t ahead_rate) {
    constexpr int kColumns = kBlocks * kVectors;
    F32 sums[kRows][kColumns];
    OCTAVO_UNROLL for (int r = 0; r < kRows; r++)
        OCTAVO_UNROLL for (int j = 0; j < kColumns; j++)
            sums[r][j] = add ? load(c + r * c_stride + j * kLanes) : F32{};
    for (int64_t p = 0; p < pairs; p++) {
        U32 columns[kColumns];
        OCTAVO_UNROLL for (int j = 0; j < kColumns; j++)
            columns[j] = load_as<U32>(b.data + p * b.pair + j / kVectors * b.block + j % kVectors * kLanes * 2);
        for (int64_t i = 0; i < ahead_rate && ahead.at < ahead.end; i++, ahead.at += 64)
            __builtin_prefetch(ahead.at, 0, 2);
        OCTAVO_UNROLL for (int r = 0; r < kRows; r++) {
            const U32 row = splat_word(a + r * a_stride + 2 * p);
            OCTAVO_UNROLL for (int j = 0; j < kColumns; j++) sums[r][j] = dot2(sums[r][j], row, columns[j]);
        }
    }
    OCTAVO_UNROLL for (int r = 0; r < kRows; r++)
        OCTAVO_UNROLL for (int j = 0; j < kColumns; j++) store(c + r * c_stride + j * kLanes, sums[r][j]);
}

// Tiles of up to kTileRows rows or kMaxPanel blocks, as far as the registers hold their sums.
#if defined(OCTAVO_AVX512)
constexpr int kTileRows = 8, kTileArea = 24;
#else
constexpr int kTileRows = 4, kTileArea = 4;
#endif

template <int kRows, int kBlocks>
constexpr Tile tile_or_null() {
    if constexpr (kRows * kBlocks <= kTileArea) return product_tile<kRows, kBlocks>;
    return nullptr;
}

struct TileTable {
    Tile tile[kTileRows * kMaxPanel];
};

template <int... kIndex>
constexpr TileTable make_tiles(std::integer_sequence<int, kIndex...>) {
    return {{tile_or_null<kIndex / kMaxPanel + 1, kIndex % kMaxPanel + 1>()...}};
}

constexpr TileTable kTiles = make_tiles(std::make_integer_sequence<int, kTileRows * kMaxPanel>());

// c [rows, 16 blocks] = a [rows, 2 pairs] b, or += if `add`.
OCTAVO_INLINE void product(const bf16* a, int64_t a_stride, int64_t rows, Pairs b, int64_t blocks, int64_t pairs,
                           bool add, float* c, int64_t c_stride, Ahead ahead) {
    const int64_t tallest = rows < kTileRows ? rows : kTileRows, fit = kTileArea / tallest;
    const int64_t widest = fit < kMaxPanel ? fit : kMaxPanel;
    const int64_t tiles = (blocks + widest - 1) / widest * ((rows + tallest - 1) / tallest);
    const int64_t rate = ((ahead.end - ahead.at) / 64 + tiles * pairs - 1) / (tiles * pairs);
    for (int64_t j = 0, width; j < blocks; j += width) {
        width = even_step(blocks - j, widest);
        const Pairs columns{b.data + j * b.block, b.pair, b.block};
        for (int64_t r = 0, height; r < rows; r += height) {
            height = even_step(rows - r, tallest);
            kTiles.tile[(height - 1) * kMaxPanel + width - 1](a + r * a_stride, a_stride, columns, pairs, add,
                                                             c + r * c_stride + j * kBlock, c_stride, ahead, rate);
            ahead.at += rate * pairs * 64;
        }
    }
}

}  // namespace octavo::OCTAVO_ISA

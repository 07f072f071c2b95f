// The inner loop of linears and of attention:
//
//   c[r, j] = sum over k of a[r, k] * b[k, j]
//
// Both operands are read in 4-byte words along k: two bf16, summed in float, or four bytes (int8 times uint8), summed
// exactly in int32. Each c[r, j] has one accumulator, which takes the words in ascending order, whatever the number of
// rows and columns computed together. So a row has the same bits in any batch.
//
// To hide the latency of memory, each product prefetches the operands of the next one (`ahead`).
#pragma once

#include <utility>

#include "simd.h"

namespace octavo::OCTAVO_ISA {

constexpr int64_t kSumsStride = kMaxPanel * kBlock;  // of the sums of a linear

// The left operand's rows, `stride` bytes apart.
struct Rows {
    const void* data;
    int64_t stride;

    OCTAVO_INLINE Rows from(int64_t row) const { return {static_cast<const char*>(data) + row * stride, stride}; }
    OCTAVO_INLINE const char* word(int64_t row, int64_t w) const {
        return static_cast<const char*>(data) + row * stride + 4 * w;
    }
};

// The right operand: word w of the 16 columns of block j is at data + w * word + j * block, in bytes.
struct Columns {
    const void* data;
    int64_t word, block;

    OCTAVO_INLINE Columns from(int64_t j) const { return {static_cast<const char*>(data) + j * block, word, block}; }
    OCTAVO_INLINE U32 vector(int64_t w, int j) const {
        const auto* at = static_cast<const char*>(data) + w * word + j / kVectors * block;
        return load_as<U32>(at + j % kVectors * sizeof(U32));
    }
};

OCTAVO_INLINE F32 dot(F32 sum, U32 row, U32 column) { return dot2(sum, row, column); }
OCTAVO_INLINE I32 dot(I32 sum, U32 row, U32 column) { return dot4(sum, column, row); }

// A kernel for one size of tile. Sum: F32 or I32, the type of c. `add`: c += the product. The stride of c is in
// elements; `ahead_rate` cache lines of `ahead` are prefetched per word.
template <class Sum>
using Tile = void (*)(Rows a, Columns b, int64_t words, bool add, void* c, int64_t c_stride, Ahead ahead,
                      int64_t ahead_rate);

template <class Sum, int kRows, int kBlocks>
void product_tile(Rows a, Columns b, int64_t words, bool add, void* c, int64_t c_stride, Ahead ahead,
                  int64_t ahead_rate) {
    constexpr int kColumns = kBlocks * kVectors;
    const auto at = [&](int r, int j) { return static_cast<float*>(c) + r * c_stride + j * kLanes; };
    Sum sums[kRows][kColumns];
    OCTAVO_UNROLL for (int r = 0; r < kRows; r++)
        OCTAVO_UNROLL for (int j = 0; j < kColumns; j++) sums[r][j] = add ? load_as<Sum>(at(r, j)) : Sum{};
    for (int64_t w = 0; w < words; w++) {
        U32 columns[kColumns];
        OCTAVO_UNROLL for (int j = 0; j < kColumns; j++) columns[j] = b.vector(w, j);
        ahead.next(ahead_rate * 64).prefetch();
        OCTAVO_UNROLL for (int r = 0; r < kRows; r++) {
            const U32 row = splat_word(a.word(r, w));
            OCTAVO_UNROLL for (int j = 0; j < kColumns; j++) sums[r][j] = dot(sums[r][j], row, columns[j]);
        }
    }
    OCTAVO_UNROLL for (int r = 0; r < kRows; r++)
        OCTAVO_UNROLL for (int j = 0; j < kColumns; j++) store_as<Sum>(at(r, j), sums[r][j]);
}

// Tiles have up to kTileRows rows and kMaxPanel blocks, and at most kTileArea sums of a row and a block: what fits
// registers.
#if defined(OCTAVO_AVX512)
constexpr int kTileRows = 8, kTileArea = 24;
#else
constexpr int kTileRows = 4, kTileArea = 4;
#endif

template <class Sum, int kRows, int kBlocks>
constexpr Tile<Sum> tile_or_null() {
    if constexpr (kRows * kBlocks <= kTileArea) return product_tile<Sum, kRows, kBlocks>;
    return nullptr;
}

template <class Sum>
struct TileTable {
    Tile<Sum> tile[kTileRows * kMaxPanel];
};

template <class Sum, int... kIndex>
constexpr TileTable<Sum> make_tiles(std::integer_sequence<int, kIndex...>) {
    return {{tile_or_null<Sum, kIndex / kMaxPanel + 1, kIndex % kMaxPanel + 1>()...}};
}

template <class Sum>
constexpr TileTable<Sum> kTiles = make_tiles<Sum>(std::make_integer_sequence<int, kTileRows * kMaxPanel>());

// c [rows, 16 * blocks] = a [rows, words] * b [words, 16 * blocks]; += if `add`. The stride of c is in elements.
template <class Sum>
OCTAVO_INLINE void product(Rows a, int64_t rows, Columns b, int64_t blocks, int64_t words, bool add, float* c,
                           int64_t c_stride, Ahead ahead) {
    const int64_t tallest = rows < kTileRows ? rows : kTileRows, fit = kTileArea / tallest;
    const bool alone = rows == 1 && b.word == 4 * kBlock;  // block by block, a single row reads a weight sequentially
    const int64_t widest = alone ? 1 : fit < kMaxPanel ? fit : kMaxPanel;
    const int64_t tiles = (blocks + widest - 1) / widest * ((rows + tallest - 1) / tallest);
    const int64_t rate = ((ahead.end - ahead.at) / 64 + tiles * words - 1) / (tiles * words);
    for (int64_t j = 0, width; j < blocks; j += width) {
        width = even_step(blocks - j, widest);
        for (int64_t r = 0, height; r < rows; r += height) {
            height = even_step(rows - r, tallest);
            kTiles<Sum>.tile[(height - 1) * kMaxPanel + width - 1](a.from(r), b.from(j), words, add,
                                                                  c + r * c_stride + j * kBlock, c_stride, ahead, rate);
            ahead.at += rate * words * 64;
        }
    }
}

}  // namespace octavo::OCTAVO_ISA

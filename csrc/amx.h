// The product of a linear on AMX tiles: 32 rows times 32 columns in four tiles of sums, 32 values of k at a time.
//
// Inline assembly, because GCC 12's intrinsics are unsafe: its _tile_loadconfig is declared to read 8 bytes of the 64,
// and its _tile_loadd does not order against earlier stores.
#pragma once

#include "product.h"

namespace octavo::OCTAVO_ISA {

constexpr int64_t kGroupRows = 32;

// All eight tiles are 16 rows of 64 bytes. Rows past the ones in use hold anything: a row of a product does not depend
// on its neighbours.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

inline void start_thread() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

inline void stop_thread() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
OCTAVO_INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
OCTAVO_INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
OCTAVO_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kSums, int kA, int kB>
OCTAVO_INLINE void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

// Up to 2 x 2 tiles of sums: tile 2 i + j is rows 16 i ..., columns 16 j ...
template <int kRowTiles, int kColumnTiles>
void tile_product(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_block, int64_t tiles, float* c,
                  int64_t c_stride, Ahead ahead, int64_t ahead_rate) {
    tile_zero<0>();
    if constexpr (kColumnTiles > 1) tile_zero<1>();
    if constexpr (kRowTiles > 1) tile_zero<2>();
    if constexpr (kRowTiles > 1 && kColumnTiles > 1) tile_zero<3>();
    for (int64_t k = 0; k < tiles; k++) {
        tile_load<4>(a + k * 32, a_stride * 2);
        if constexpr (kRowTiles > 1) tile_load<5>(a + 16 * a_stride + k * 32, a_stride * 2);
        tile_load<6>(b + k * 512, 64);
        tile_multiply<0, 4, 6>();
        if constexpr (kRowTiles > 1) tile_multiply<2, 5, 6>();
        if constexpr (kColumnTiles > 1) {
            tile_load<7>(b + b_block + k * 512, 64);
            tile_multiply<1, 4, 7>();
            if constexpr (kRowTiles > 1) tile_multiply<3, 5, 7>();
        }
        for (int64_t i = 0; i < ahead_rate && ahead.at < ahead.end; i++, ahead.at += 64)
            __builtin_prefetch(ahead.at, 0, 2);
    }
    tile_store<0>(c, c_stride * 4);
    if constexpr (kColumnTiles > 1) tile_store<1>(c + 16, c_stride * 4);
    if constexpr (kRowTiles > 1) tile_store<2>(c + 16 * c_stride, c_stride * 4);
    if constexpr (kRowTiles > 1 && kColumnTiles > 1) tile_store<3>(c + 16 * c_stride + 16, c_stride * 4);
}

OCTAVO_INLINE void weight_product(const Instruction& op, int64_t row, int64_t rows, int64_t block, int64_t blocks,
                                  float* sums, Ahead ahead) {
    const Weight& w = *op.weight;
    const int64_t b_block = w.pairs() * 2 * kBlock, steps = w.pairs() / 16, products = (blocks + 1) / 2;
    for (int64_t j = 0; j < blocks; j += 2) {
        const auto product = rows > 16 ? (blocks - j > 1 ? tile_product<2, 2> : tile_product<2, 1>)
                                       : (blocks - j > 1 ? tile_product<1, 2> : tile_product<1, 1>);
        const Ahead part = ahead.part(j / 2, products);
        const int64_t rate = ((part.end - part.at) / 64 + steps - 1) / steps;
        product(op.x.b16(row), op.x.stride, w.b16_block(block + j), b_block, steps, sums + j * kBlock, kMaxPanel * kBlock,
                part, rate);
    }
}

}  // namespace octavo::OCTAVO_ISA

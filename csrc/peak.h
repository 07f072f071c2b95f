// The ceiling of arithmetic: the inner loop of a linear on operands that never leave the first-level cache.
#pragma once

#include "product.h"
#ifdef OCTAVO_AMX
#include "amx.h"
#endif

namespace octavo::OCTAVO_ISA {

// Some microseconds of bf16 dot products; returns how many operations they were. `out` has room for kPeakFloats.
#ifdef OCTAVO_AMX
int64_t peak_products(float* out) {
    constexpr int64_t kTimes = 256;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
    for (int64_t i = 0; i < kTimes; i++) {
        tile_multiply<F32, 0, 4, 6>();
        tile_multiply<F32, 1, 4, 7>();
        tile_multiply<F32, 2, 5, 6>();
        tile_multiply<F32, 3, 5, 7>();
    }
    tile_store<0>(out, 64);
    return kTimes * 4 * 16 * 16 * 32 * 2;
}
#else
int64_t peak_products(float* out) {
    constexpr int64_t kPairs = 1024;
    constexpr int kWide = kTileArea / kTileRows;
    alignas(64) bf16 row[2 * kPairs] = {}, columns[kWide * 2 * kBlock] = {};
    static_assert(kTileRows * kWide * kBlock <= kPeakFloats);
    int64_t stride = 0;      // every row and every pair is the same one,
    asm("" : "+r"(stride));  // which the compiler must not know, or it would compute it once
    product_tile<F32, kTileRows, kWide>({row, stride}, {columns, stride, 4 * kBlock}, kPairs, false, out, kWide * kBlock,
                                        {}, 0);
    return kPairs * kTileRows * kWide * kBlock * 2 * 2;
}
#endif

}  // namespace octavo::OCTAVO_ISA

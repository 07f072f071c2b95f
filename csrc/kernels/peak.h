// The arithmetic ceiling: the inner loop of a linear, on operands that stay in the first-level cache.
#pragma once

#include <type_traits>

#include "product.h"
#ifdef OCTAVO_AMX
#include "amx.h"
#endif

namespace octavo::OCTAVO_ISA {

// Operations per 4-byte word: a multiplication and an addition for each of its values.
template <class Sum>
constexpr int64_t kOperations = std::is_same_v<Sum, F32> ? 4 : 8;

// Compute dot products for a few microseconds, of bf16 (Sum is F32) or of int8 (I32); return the number of operations.
// `out` has room for kPeakFloats.
#ifdef OCTAVO_AMX
template <class Sum>
int64_t peak_products(float* out) {
    constexpr int64_t kTimes = 256;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
    for (int64_t i = 0; i < kTimes; i++) {
        tile_multiply<Sum, 0, 4, 6>();
        tile_multiply<Sum, 1, 4, 7>();
        tile_multiply<Sum, 2, 5, 6>();
        tile_multiply<Sum, 3, 5, 7>();
    }
    tile_store<0>(out, 64);
    return kTimes * 4 * 16 * 16 * 16 * kOperations<Sum>;
}
#else
template <class Sum>
int64_t peak_products(float* out) {
    constexpr int64_t kWords = 1024;
    constexpr int kWide = kTileArea / kTileRows;
    alignas(64) std::byte row[4 * kWords] = {}, columns[kWide * 4 * kBlock] = {};
    static_assert(kTileRows * kWide * kBlock <= kPeakFloats);
    int64_t stride = 0;      // all rows and words are the same memory, which is hidden from the compiler:
    asm("" : "+r"(stride));  // otherwise it would compute only one product
    product_tile<Sum, kTileRows, kWide>({row, stride}, {columns, stride, 4 * kBlock}, kWords, false, out,
                                        kWide * kBlock, {}, 0);
    return kWords * kTileRows * kWide * kBlock * kOperations<Sum>;
}
#endif

}  // namespace octavo::OCTAVO_ISA

// The table of kernels of one instruction set. Only isa_*.cpp include this file.
#pragma once

#include "attention.h"
#include "formats/four_bits.h"
#include "linear.h"
#include "peak.h"
#include "rope_and_cache.h"
#include "rows.h"
#include "scan_kernels.h"

namespace octavo::OCTAVO_ISA {

#ifndef OCTAVO_AMX
inline void start_thread() {}
inline void stop_thread() {}
#endif

extern const Kernels kernels;
const Kernels kernels = {
    .start_thread = start_thread,
    .stop_thread = stop_thread,
    .embed = embed,
    .norm = norm,
    .quantize = quantize,
    .pool_rows = pool_rows,
    .sampled_rows = sampled_rows,
    .sum_partials = sum_partials,
    .rope_and_cache = rope_and_cache,
    .attention = attention,
    .linear = linear,
    .quantize_to_4 = quantize_to_4,
    .peak_products = peak_products<F32>,
    .peak_integer_products = peak_products<I32>,
    .scan = kScan,
};

}  // namespace octavo::OCTAVO_ISA

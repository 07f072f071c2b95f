// Packing: convert the bytes of tensors in their files to the layout that the kernels read.
#pragma once

#include <vector>

#include "kernels/kernels.h"

namespace octavo {

// A tensor in one of the formats of quants.h, or some of its rows and columns. A weight is one part or several, stacked
// by rows.
struct Part {
    const uint8_t* data;
    int64_t rows, row_bytes;
    int format;                // Format
    const int64_t* row_order;  // row i is stored as row row_order[i]; null: as row i
    int64_t first;   // columns of each stored row that are skipped, as they share a block with the part's first
    int64_t stored;  // columns of a stored row: whole blocks
};

constexpr int64_t kMostSkipped = 512;  // more columns than a part can have in its first and last block, but not use

// Return whether an encoding of integers stores every value of a format without loss. Other formats can only be
// quantized to kW8 and kW4.
bool holds_losslessly(Encoding encoding, int format);

// Packs block `block` of a weight. `column_weights` (see quantize.h) and `search` are for weights quantized to 4 bits.
// `scratch` must have 17 rows of weight.columns + 64 floats, and kMostSkipped more.
//
// Returns -1, or the index of a part with a value that cannot be stored: NaN, infinity, or a value that is too large to
// be quantized (see kMost8 and kMost4 in pack.cpp).
int pack_block(const Weight& weight, const std::vector<Part>& parts, const float* column_weights, FourBitsKernel search,
               int64_t block, float* scratch);

}  // namespace octavo

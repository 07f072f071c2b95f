// From a tensor's bytes as its file holds them to the layout that the kernels read.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace octavo {

// Some rows of a weight, in one of the formats of quants.h.
struct Part {
    const uint8_t* data;
    int64_t rows, row_bytes;
    int format;                 // Format
    const int64_t* row_order;   // row i is stored as row row_order[i]; null: as row i
};

// The Format of "BF16", "Q4_1", ...; -1 if there is none.
int format_named(const std::string& name);

// Whether an encoding of integers takes those of a format as they are. If not, they are quantized anew, which is only
// for kW8 and kW4.
bool holds_losslessly(Encoding encoding, int format);

// Writes block `block` of the weight. `column_weights` (see quantize.h) is for what is quantized to 4 bits, by `search`.
// `scratch` is for 17 rows of weight.columns + 64 floats.
void pack_block(const Weight& weight, const std::vector<Part>& parts, const float* column_weights,
                FourBitsKernel search, int64_t block, float* scratch);

}  // namespace octavo

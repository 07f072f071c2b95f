// Reading rows of tensors in the formats of block_formats.def.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "encoding.h"

namespace octavo {

// The formats of block_formats.def, with GGML's type numbers.
enum Format : int {
#define OCTAVO_FORMAT(name, number, values, bytes) FORMAT_##name = number,
#include "../../src/octavo/formats/block_formats.def"
#undef OCTAVO_FORMAT
};

// 32 neighboring values of a row: value[i] = scale[i / 16] * q[i] + minimum[i / 16].
struct Group {
    uint8_t q[kQuantGroup];
    float scale[2], minimum[2];
};

// Return the format with the name "BF16", "Q4_1", ...; -1 if there is none.
int format_named(const std::string& name);

// Return the bytes of a row of n values; 0 if there is no such format or n is not a multiple of its block size.
size_t row_bytes(int format, int64_t n);

// Return the smallest encoding that stores every value of a format without loss.
Encoding encoding_of(int format);

// Dequantizes n values: one row, or several contiguous ones. `src` need not be aligned. Returns false, and writes
// nothing, if row_bytes(format, n) is 0.
bool dequantize_row(int format, const void* src, float* dst, int64_t n);

// Reads the integers, scales and minima of a row of n values. The format's encoding must have integers. Returns the
// integer that stands for zero in a format without minima (minimum = -zero * scale), and 0 in a format with minima.
int read_groups(int format, const void* src, Group* dst, int64_t n);

// Return whether all magnitudes are at most `limit`; false for infinities and NaN.
bool all_within(const float* values, int64_t n, float limit);

float from_half(uint16_t half);
uint16_t to_half(float value);  // to nearest, ties to even

}  // namespace octavo

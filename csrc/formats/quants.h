// Reading tensor formats: GGML's F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and Q2_K to Q6_K, W4G32 and W8G32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "encoding.h"

namespace octavo {

// GGML's numbers of the formats, as GGUF files hold them. W4G32 and W8G32 are what AWQ and GPTQ checkpoints are made
// into: groups of 32 values as float scale, float minimum, and 4-bit integers in Q4_1's order, or signed 8-bit ones.
enum Format : int {
    GGML_F32 = 0, GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q4_1 = 3, GGML_Q5_0 = 6, GGML_Q5_1 = 7, GGML_Q8_0 = 8,
    GGML_Q2_K = 10, GGML_Q3_K = 11, GGML_Q4_K = 12, GGML_Q5_K = 13, GGML_Q6_K = 14, GGML_BF16 = 30, W4G32 = 1000,
    W8G32 = 1001,
};

// 32 neighboring values of a row: scale * q + minimum, where each half has its own scale and minimum.
struct Group {
    uint8_t q[kQuantGroup];
    float scale[2], minimum[2];
};

// Bytes of a row of n values; 0 if the format is not one of the above, or n no multiple of its block size.
size_t row_bytes(int format, int64_t n);

// The encoding that holds every value of a format without loss.
Encoding encoding_of(int format);

// The n values of one row, or of several rows that lie one after another: the blocks of a format know no rows.
// `src` need not be aligned. False, and nothing is written, where row_bytes is 0.
bool dequantize_row(int format, const void* src, float* dst, int64_t n);

// The integers of a row of n values in a format whose encoding has some; returns what its zero is: of a format without
// minima, the minimum is minus so many times the scale.
int read_groups(int format, const void* src, Group* dst, int64_t n);

float from_half(uint16_t half);
uint16_t to_half(float value);  // to nearest, ties to even

}  // namespace octavo

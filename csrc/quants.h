// Reading GGML's tensor formats: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and Q2_K to Q6_K.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

// GGML's numbers of the formats, as GGUF files hold them.
enum GgmlType : int {
    GGML_F32 = 0, GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q4_1 = 3, GGML_Q5_0 = 6, GGML_Q5_1 = 7, GGML_Q8_0 = 8,
    GGML_Q2_K = 10, GGML_Q3_K = 11, GGML_Q4_K = 12, GGML_Q5_K = 13, GGML_Q6_K = 14, GGML_BF16 = 30,
};

// Bytes of a row of n values; 0 if the format is not one of the above, or n no multiple of its block size.
size_t row_bytes(int ggml_type, int64_t n);

// The n values of one row, or of several rows that lie one after another: the blocks of a format know no rows.
// `src` need not be aligned. False, and nothing is written, where row_bytes is 0.
bool dequantize_row(int ggml_type, const void* src, float* dst, int64_t n);

}  // namespace octavo

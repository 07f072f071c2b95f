// Quantizing floats to the integers of a weight. The search for 4 bits is in four_bits.h.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "quants.h"

namespace octavo {

// Rotates a row of n values (see kernels/rotation.h) and quantizes it to kW8, with one scale for the row. `values` is
// overwritten, and must have space for a multiple of 64, the rest of which is set to zero.
void quantize_groups(float* values, Group* groups, int64_t n);

// Quantizes n values, a multiple of 32, to a row of Q8_0.
void quantize_to_q8_0(const float* values, uint8_t* to, int64_t n);

// The weights w of the squared errors that Kernels::quantize_to_4 minimizes, one for each of n columns. Within a group of
// 32, with i the importance: w = 0.01 + i / mean(i). w = 1 in groups whose importances are negative, not finite or all
// zero, and everywhere if `importance` is null.
std::vector<float> column_weights(const float* importance, int64_t n);

// Transposes columns group * 32 ... group * 32 + 31 of 16 rows of n values into to[column][row]. Columns past the last
// one, and rows that are null, become zeros.
void gather_columns(const float* const rows[kBlock], int64_t group, int64_t n, float (*to)[kBlock]);

// Quantizes at most 16 rows of n values, a multiple of 32, to rows of Q4_1. `weights`: see column_weights.
void quantize_to_q4_1(FourBitsKernel search, const float* values, const float* weights, uint8_t* to, int64_t rows,
                      int64_t n);

}  // namespace octavo

// From floats to the integers of a weight. The search for the best 4 bits is four_bits.h.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "quants.h"

namespace octavo {

// A row of n values to kW8, which rotates it. There is room for a multiple of 64, the rest of which counts as zeros;
// `values` is overwritten.
void quantize_groups(float* values, Group* groups, int64_t n);

// n values, a multiple of 32, into a row of Q8_0.
void quantize_to_q8_0(const float* values, uint8_t* to, int64_t n);

// How much the square of an error counts in each of n columns, made fit for Kernels::quantize_to_4: in proportion to
// `importance` within a group, and at least a little. All alike in groups where it is no sound number, or if it is null.
std::vector<float> column_weights(const float* importance, int64_t n);

// The values of columns group * 32 ... group * 32 + 31 of 16 rows of n, zeros past the last one; a null row is of zeros.
void gather_columns(const float* const rows[kBlock], int64_t group, int64_t n, float (*to)[kBlock]);

// At most 16 rows of n values, a multiple of 32, into rows of Q4_1; weights of the columns as column_weights gives them.
void quantize_to_q4_1(FourBitsKernel search, const float* values, const float* weights, uint8_t* to, int64_t rows,
                      int64_t n);

}  // namespace octavo

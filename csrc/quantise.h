// From floats to the integers of a weight, at load.
#pragma once

#include <cstdint>

#include "quants.h"

namespace octavo {

// A row of n values to kW8, which rotates it, or kW4. There is room for a multiple of encoding.column_multiple(), the
// rest of which counts as zeros; `values` is overwritten.
void quantise_groups(Encoding encoding, float* values, Group* groups, int64_t n);

// n values, a multiple of 32, into a row of Q8_0 or Q4_1; false, and nothing is written, for any other format.
bool quantise_row(int format, const float* values, uint8_t* to, int64_t n);

}  // namespace octavo

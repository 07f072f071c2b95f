// The instruction sets of this machine, and the kernels for each.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace octavo {

// Return the instruction sets among amx, avx512, avx2 and portable that this machine can run, the fastest first.
// Requests the operating system's permission to use AMX.
std::vector<std::string> available_isas();

// Return the kernels of an available instruction set. Throws std::invalid_argument for any other name.
const Kernels& kernels_for(const std::string& isa);

}  // namespace octavo

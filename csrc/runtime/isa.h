// Which instruction sets this machine has, and the kernels for each.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace octavo {

// Return those of amx, avx512, avx2 and portable that this machine can run, fastest first. Requests the operating
// system's permission to use AMX.
std::vector<std::string> available_isas();

// Return the kernels of an available instruction set. Throws std::invalid_argument for any other name.
const Kernels& kernels_for(const std::string& isa);

}  // namespace octavo

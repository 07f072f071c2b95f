// Which instruction sets this machine has.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace octavo {

// Those of amx, avx512, avx2 and portable that can run here, the fastest first. Asks the kernel for leave to use AMX.
std::vector<std::string> available_isas();

// The kernels of one of them. Throws std::invalid_argument for any other name.
const Kernels& kernels_for(const std::string& isa);

}  // namespace octavo

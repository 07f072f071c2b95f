// What this machine can do at best, to set beside what a step takes.
#pragma once

#include "kernels/kernels.h"
#include "thread_pool.h"

namespace octavo {

struct Ceilings {
    double bytes_per_second;       // read from memory, all threads together
    double operations_per_second;  // of bf16 dot products; a multiplication and an addition are two
    double integer_operations_per_second;  // of int8 ones
};

// The best of several short tries, as other programs may be in the way: half a second, and 512 MiB for as long.
Ceilings measure_ceilings(const Kernels& kernels, ThreadPool& pool);

}  // namespace octavo

// The machine's roofline: the peak rates of reading memory and of multiplying.
#pragma once

#include "kernels/kernels.h"
#include "thread_pool.h"

namespace octavo {

struct Ceilings {
    // Of all threads together. A multiplication and an addition count as two operations.
    double bytes_per_second;               // read from memory
    double operations_per_second;          // bf16 dot products
    double integer_operations_per_second;  // int8 dot products
};

// Measure the ceilings: the best of several short runs, since other programs may use the machine too. Takes half a
// second and 512 MiB of memory.
Ceilings measure_ceilings(const Kernels& kernels, ThreadPool& pool);

}  // namespace octavo

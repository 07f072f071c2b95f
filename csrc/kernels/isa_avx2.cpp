// The kernels for AVX2, FMA and F16C (Haswell, Zen and later).
#define OCTAVO_ISA avx2
#define OCTAVO_AVX2
#include "isa_kernels.h"

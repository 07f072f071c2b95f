// The kernels for AVX-512 with BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#define OCTAVO_ISA avx512
#define OCTAVO_AVX512
#include "isa_kernels.h"

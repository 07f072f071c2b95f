// The kernels for AMX (Sapphire Rapids and later): linears on tiles, the rest as for AVX-512.
#define OCTAVO_ISA amx
#define OCTAVO_AVX512
#define OCTAVO_AMX
#include "isa_kernels.h"

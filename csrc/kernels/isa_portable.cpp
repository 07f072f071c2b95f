// The kernels for any processor.
#define OCTAVO_ISA portable
#include "isa_kernels.h"

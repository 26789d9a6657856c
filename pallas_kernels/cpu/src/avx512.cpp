#define ISA avx512
#define KERNELS kAvx512
#include "kernels.h"

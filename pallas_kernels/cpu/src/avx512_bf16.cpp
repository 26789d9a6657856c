#define ISA avx512_bf16
#define KERNELS kAvx512Bf16
#include "kernels.h"

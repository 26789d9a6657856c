#define ISA avx512_vnni
#define KERNELS kAvx512Vnni
#include "kernels.h"

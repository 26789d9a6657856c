#define ISA avx2
#define KERNELS kAvx2
#include "kernels.h"

#define ISA baseline
#define KERNELS kBaseline
#include "kernels.h"

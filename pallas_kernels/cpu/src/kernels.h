// The table of kernels of the instruction set that the including source is compiled for. It defines ISA, a name, and
// KERNELS, that of the table.
#include "attention.h"
#include "products.h"

namespace fineserve {

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

const Kernels KERNELS = {
    TEXT(ISA),
    ISA::W,
    ISA::attend_scratch,
    ISA::attend,
    ISA::merge,
    {ISA::bf16_prepared_bytes, ISA::int8_prepared_bytes, ISA::bf16_prepared_bytes},
    {ISA::bf16_prepare, ISA::int8_prepare, ISA::bf16_prepare},
    {ISA::bf16_multiply, ISA::int8_multiply, ISA::int4_multiply},
};

}  // namespace fineserve

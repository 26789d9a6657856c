// The table of kernels of the instruction set that the including source is compiled for. It defines ISA, a name, and
// KERNELS, that of the table.
#include "attention.h"
#include "chunks.h"
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
    ISA::attend_within_scratch,
    ISA::attend_within,
    {ISA::bf16_row_bytes, ISA::int8_row_bytes, ISA::bf16_row_bytes},
    {ISA::bf16_prepare<ISA::BFloat16Kind>, ISA::int8_prepare, ISA::bf16_prepare<ISA::Int4Kind>},
    {ISA::bf16_scratch, ISA::int8_scratch, ISA::int4_scratch},
    {ISA::bf16_multiply, ISA::int8_multiply, ISA::int4_multiply},
};

}  // namespace fineserve

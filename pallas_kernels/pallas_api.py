"""All that the kernels use of Pallas, in one file, because Pallas renames and moves things from release to release.

Holds for JAX 0.10.2 to 0.12. Kernels import names from here and nothing from `jax.experimental.pallas`; what is called
differently in some release is told apart here, by what is there and not by version numbers.

From 0.11 on JAX warns, when it compiles a Triton kernel for a GPU, that this backend is deprecated; 0.12 still has it.

Three groups of names: what all kernels share, `triton_*` for GPUs, `tpu_*` for TPUs.
"""

from typing import Any

from jax.experimental import pallas as _pallas
from jax.experimental.pallas import tpu as _tpu
from jax.experimental.pallas import triton as _triton

# -- shared ----------------------------------------------------------------------------------------------------

BlockSpec = _pallas.BlockSpec
ds = _pallas.ds
multiple_of = _pallas.multiple_of
pallas_call = _pallas.pallas_call
program_id = _pallas.program_id
when = _pallas.when

# -- GPUs, through Triton --------------------------------------------------------------------------------------

# Loads and stores take masks.
triton_load = _triton.load
triton_store = _triton.store


def triton_params(num_warps: int, num_stages: int) -> Any:
    """Compiler parameters that choose Triton, and how many warps a program has and how deep loops are pipelined."""
    return _triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)


# -- TPUs, through Mosaic --------------------------------------------------------------------------------------

TpuPrefetchScalarGridSpec = _tpu.PrefetchScalarGridSpec
tpu_async_copy = _tpu.make_async_copy
tpu_roll = _tpu.roll
TpuDMASemaphore = _tpu.SemaphoreType.DMA
TpuVMEM = _tpu.VMEM


def tpu_in_place() -> _pallas.BlockSpec:
    """The block spec of an array that stays where it is; kernels copy parts of it."""
    return _pallas.BlockSpec(memory_space=_pallas.ANY)


def tpu_params(dimension_semantics: Any = None, vmem_limit_bytes: int | None = None) -> Any:
    """Compiler parameters that choose Mosaic.

    Args:
        dimension_semantics: "parallel" or "arbitrary" for each grid axis.
        vmem_limit_bytes: vector memory that the kernel may use; None: the compiler's default.
    """
    return _tpu.CompilerParams(dimension_semantics=dimension_semantics, vmem_limit_bytes=vmem_limit_bytes)


def tpu_interpret(wanted: bool) -> Any:
    """The `interpret` argument of `pallas_call` of a TPU kernel: to run it on a CPU, or to compile it.

    Interpreted, copies too, what none has written reads as NaN (in integers, as their largest value).
    """
    return _tpu.InterpretParams(uninitialized_memory="nan") if wanted else False

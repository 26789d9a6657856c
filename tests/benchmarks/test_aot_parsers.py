"""What the ahead-of-time matrix reads out of compilers' outputs and of kernels' own code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.aot import results, table
from benchmarks.aot.ptx import Resources, parse_ptx, parse_ptxas
from benchmarks.aot.results import Bytes, Kernel, Result
from benchmarks.aot.tpu import parse_hlo
from benchmarks.aot.traffic import count_traffic
from fineserve_jax.pallas_kernels.pallas_api import (
    BlockSpec,
    TpuDMASemaphore,
    TpuPrefetchScalarGridSpec,
    TpuVMEM,
    ds,
    pallas_call,
    program_id,
    tpu_async_copy,
    tpu_in_place,
    tpu_params,
    triton_load,
    triton_params,
    triton_store,
)

PTX = """
.version 8.8
.target sm_90a
.visible .entry attend(
	.param .u64 .ptr .align 16 attend_param_0,
	.param .u64 .ptr .align 16 attend_param_1,
	.param .u64 .ptr .align 256 attend_param_2
)
.reqntid 128, 1, 1
{
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [attend_param_0];
	ld.param.b64 	%rd2, [attend_param_1];
	cvta.to.global.u64 	%rd3, %rd1;
	mul.wide.u32 	%rd4, %r1, 4;
	add.s64 	%rd5, %rd2, %rd4;
	// begin inline asm
	mov.u32 %r7, 0x0; @%p1 ld.global.b32 { %r7 }, [ %rd5 + 0 ];
	// end inline asm
$L__LOOP:
	add.s64 	%rd6, %rd3, %rd8;
	mov.u32 %r2, 0x0; ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd6 + 0 ];
	mov.u16 %rs1, 0x0; ld.global.L1::evict_first.b16 { %rs1 }, [ %rd6 + 128 ];
	cp.async.cg.shared.global [ %r9 + 0 ], [ %rd6 + 64 ], 0x10, %r8;
	cp.async.ca.shared.global [ %r9 + 16 ], [ %rd6 + 96 ], 0x8, %r8;
	bra.uni 	$L__LOOP;
	ret;
}
.visible .entry other(
	.param .u64 .ptr .align 16 other_param_0
)
{
	ld.param.b64 	%rd1, [other_param_0];
	ld.global.b64 	%rd2, [%rd1];
	ld.global.v2.b32 	{%r1, %r2}, [%rd2];
	ret;
}
"""

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    16 bytes stack frame, 24 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_loads_are_counted_by_the_argument_they_read_and_their_width():
    kernels = parse_ptx(PTX)
    assert kernels["attend"].threads == 128
    assert kernels["attend"].loads == {(0, 16): 2, (0, 8): 1, (0, 2): 1, (1, 4): 1}


def test_what_was_loaded_is_no_longer_of_an_argument():
    assert parse_ptx(PTX)["other"].loads == {(0, 8): 1, (None, 8): 1}


def test_ptxas_tells_registers_spills_and_shared_memory_of_each_kernel():
    assert parse_ptxas(PTXAS) == {"attend": Resources(168, 72, 512), "other": Resources(40, 0, 0)}


def test_vector_memory_of_mosaic_kernels_is_read_from_the_compiled_program():
    line = (
        '  %attend.1 = f32[8,128] custom-call(%a), custom_call_target="tpu_custom_call", backend_config='
        '{"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}\n'
    )
    assert parse_hlo("HloModule m\n  %other = f32[8] add(%a, %b)\n" + line) == [Kernel("attend.1", vmem_bytes=4096)]


def _triton_kernel(table, x, out, *, repeats):
    row = program_id(0)
    words = ds(0, 16)

    def add(i, total):
        page = triton_load(table.at[row, i])
        scale = triton_load(x.at[jnp.full((16, 16) if repeats else (1, 1), page), 16])
        keep = jnp.arange(16) < 10
        return total + triton_load(x.at[page, words], mask=keep, other=jnp.float32(0)) * scale[0]

    count = triton_load(table.at[row, 3])
    total = jax.lax.fori_loop(0, count, add, jnp.zeros(16, jnp.float32))
    triton_store(out.at[row, words], total)


def _triton(table, x, repeats):
    return pallas_call(
        functools.partial(_triton_kernel, repeats=repeats),
        grid=(2,),
        out_shape=jax.ShapeDtypeStruct((2, 16), jnp.float32),
        compiler_params=triton_params(num_warps=1, num_stages=1),
        interpret=True,
    )(table, x)


@pytest.mark.parametrize("repeats", [False, True])
def test_loads_are_counted_as_often_as_loops_run_and_as_far_as_masks_let_them(repeats):
    table = np.array([[1, 2, 3, 3], [4, 0, 0, 1]], np.int32)
    x = jax.ShapeDtypeStruct((5, 32), jnp.float32)
    (kernel,) = count_traffic(functools.partial(_triton, repeats=repeats), table, x)
    by_table, by_x, out = kernel.operands
    pages = 3 + 1
    assert by_table.read == 4 * (pages + 2)
    # A scale that is loaded once for every place it applies to costs as much as what it scales.
    assert by_x.read == 4 * pages * (10 + (256 if repeats else 1))
    assert (out.read, out.written) == (0, 2 * 16 * 4)


def _mosaic_kernel(pages, x, doubled, out, buffer, semaphore):
    step = program_id(0)

    def copy(i, nothing):
        transfer = tpu_async_copy(x.at[ds(pages[step], 1)], buffer.at[ds(i, 1)], semaphore)
        transfer.start()
        transfer.wait()
        return nothing

    jax.lax.fori_loop(0, step + 1, copy, None)
    out[...] = buffer[0] + doubled[...]


def test_asynchronous_copies_and_blocks_are_counted_where_they_are_made():
    grid_spec = TpuPrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(3,),
        in_specs=[tpu_in_place(), BlockSpec((8, 128), lambda i, pages: (i // 2, 0))],
        out_specs=BlockSpec((8, 128), lambda i, pages: (i, 0)),
        scratch_shapes=[TpuVMEM((3, 8, 128), jnp.float32), TpuDMASemaphore],
    )
    call = pallas_call(
        _mosaic_kernel,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((24, 128), jnp.float32),
        compiler_params=tpu_params(),
    )
    x, doubled = jax.ShapeDtypeStruct((5, 8, 128), jnp.float32), jax.ShapeDtypeStruct((16, 128), jnp.float32)
    (kernel,) = count_traffic(call, np.array([3, 1, 2], np.int32), x, doubled)
    tile = 8 * 128 * 4
    scalars, copied, blocks, out = kernel.operands
    assert (scalars.read, copied.read, blocks.read, out.written) == (12, (1 + 2 + 3) * tile, 2 * tile, 3 * tile)


GOOD = Result(
    "H100",
    "decode",
    "a model",
    "int4",
    128,
    compile_s=1.5,
    kernels=(Kernel("attend", 100, 0, 4096, {16: 4, 2: 8}, {16: 4}, {4: 3}),),
    bytes=Bytes(must=1000, padding=0, moved=1049, other=5),
)
BAD = {
    "does not compile": {"error": "ValueError: no"},
    "spills 8 bytes": {"kernels": (dataclasses.replace(GOOD.kernels[0], spill_bytes=8),)},
    "narrower than 128 bits: 2 of 16 bits": {
        "kernels": (dataclasses.replace(GOOD.kernels[0], page_loads={16: 2, 2: 2}),)
    },
    "attend takes 129 registers": {"kernels": (dataclasses.replace(GOOD.kernels[0], registers=129),)},
    "no page load was recognised": {"kernels": (dataclasses.replace(GOOD.kernels[0], page_loads={}),)},
    "moves 1,051 bytes": {"bytes": Bytes(must=1000, padding=0, moved=1051, other=0)},
    "traffic cannot be counted": {"bytes": None, "traffic_error": "ValueError: no"},
}


def test_a_good_result_has_no_problems():
    assert GOOD.problems() == []


@pytest.mark.parametrize(("problem", "change"), BAD.items())
def test_what_is_wrong_is_said(problem, change):
    (said,) = dataclasses.replace(GOOD, **change).problems()
    assert problem in said


def test_more_registers_at_a_smaller_head_size_are_a_remark():
    found = dataclasses.replace(GOOD, head_dim=64, kernels=(dataclasses.replace(GOOD.kernels[0], registers=129),))
    assert found.problems() == []
    (said,) = found.remarks()
    assert "attend takes 129 registers" in said


def test_results_survive_being_saved(tmp_path):
    both = [GOOD, dataclasses.replace(GOOD, error="no", kernels=(), bytes=None)]
    results.save(both, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == both


def test_the_report_has_a_row_for_each_result_and_names_errors():
    failed = dataclasses.replace(GOOD, target="A100", error="ValueError: no such layout")
    text = table.markdown([GOOD, failed])
    assert "| a model | int4 | H100 | 1.5 s | attend | 100 | 0 | 4,096 | 4 x 128 | 3 x 32, 8 x 16 |" in text
    assert "decode, a model, int4, A100: does not compile: ValueError: no such layout" in text

"""Checks every kernel on this device, and measures the bandwidth that attention reaches.

    python benchmarks/attention.py                             what suits the device
    python benchmarks/attention.py --shape llama-3.1-8b --rows 128 --tokens 4096

First each operation is compared with a float64 oracle, or with what XLA writes. Then decode attention of one layer is
timed, for rows in one format and for rows of several mixed, in turns with a plain copy of as many bytes, and with JAX's
own paged attention (16-bit) where this platform has one. The limit is the bandwidth of the copy: attention has to read
every page once, and does little else. Printed are medians over the rounds and ratios; the last line is JSON.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from kernel_checks import Batch, check_operations, make_batch
from rich.console import Console
from rich.table import Table

from fineserve_jax.pallas_kernels import FORMATS, PageGeometry, choose_unit_words, paged_attention
from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.pallas_kernels.implementation import Implementation, default_implementation

WORD_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer of a model.

    Attributes:
        heads, kv_heads, head_dim: of its attention.
    """

    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "llama-3.1-8b": Shape(heads=32, kv_heads=8, head_dim=128),
    "qwen3-32b": Shape(heads=64, kv_heads=8, head_dim=128),
    "smollm2-135m": Shape(heads=9, kv_heads=3, head_dim=64),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    shape: str | None = None
    """llama-3.1-8b, qwen3-32b or smollm2-135m; by default the first, on a CPU the last."""
    rows: int = 64
    tokens: int | None = None
    """Cached tokens of a row; by default 4096, on a CPU 512."""
    page_size: int | None = None
    """By default 16, on a TPU 64."""
    rounds: int = 10
    calls: int = 10
    """Calls of a round, queued one behind the other."""
    cases: tuple[str, ...] = ("bf16", "int8", "fp8", "int4", "bf16+int8+int4")
    """KV formats of the rows; several joined by + are dealt out in turn."""
    implementation: Implementation | None = None
    checks: bool = True
    head_dims: tuple[int, ...] = (64, 128)
    """Of what is checked."""
    timings: bool = True


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    platform = jax.default_backend()
    implementation = arguments.implementation or default_implementation()
    shape_name = arguments.shape or ("smollm2-135m" if platform == "cpu" else "llama-3.1-8b")
    if shape_name not in SHAPES:
        sys.exit(f"--shape={shape_name} is unknown; use one of {', '.join(SHAPES)}")
    console = Console(highlight=False)
    console.print(f"{jax.devices()[0].device_kind}, {implementation}, one layer of {shape_name}")
    results: dict = {"device": jax.devices()[0].device_kind, "implementation": implementation, "shape": shape_name}
    if arguments.checks:
        results["errors"] = check_operations(implementation, console, arguments.head_dims)
    if arguments.timings:
        results["cases"] = measure(arguments, SHAPES[shape_name], implementation, console)
    print(json.dumps(results))


def measure(arguments: Arguments, shape: Shape, implementation: Implementation, console: Console) -> dict:
    """Times all cases in turns; returns their medians and ratios."""
    platform = jax.default_backend()
    page_size = arguments.page_size or (64 if platform == "tpu" else 16)
    tokens = arguments.tokens or (512 if platform == "cpu" else 4096)
    unit_words = choose_unit_words(shape.head_dim, page_size, tpu=get_backend(implementation).tile_units)
    geometry = PageGeometry(1, shape.kv_heads, shape.head_dim, page_size, unit_words)
    sizes, work = {}, {}
    for case in arguments.cases:
        formats = tuple(FORMATS[name] for name in case.split("+"))
        batch = make_batch(geometry, formats, [tokens] * arguments.rows, shape.heads, implementation)
        sizes[case] = batch.num_bytes
        work[case] = decode_call(batch)
        work[f"copy of {case}"] = copy_call(batch.num_bytes)
    own = jax_paged_attention(shape, arguments.rows, tokens, page_size)
    if own is not None:
        sizes["JAX's own, bf16"] = 2 * arguments.rows * tokens * shape.kv_heads * shape.head_dim * WORD_BYTES
        work["JAX's own, bf16"] = own
    for call in work.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.rounds):
        for name, call in work.items():
            seconds[name].append(_seconds(call, arguments.calls))
    return report({name: statistics.median(times) for name, times in seconds.items()}, sizes, console)


def report(seconds: dict[str, float], sizes: dict[str, int], console: Console) -> dict:
    """Prints the table; bandwidth counts what has to be read, so the copy, which also writes, counts twice."""
    table = Table("rows", "MB", "ms", "GB/s", "of a copy's bandwidth", "speed against bf16")
    results = {}
    for name, size in sizes.items():
        rate = size / seconds[name]
        copy = f"copy of {name}" if f"copy of {name}" in seconds else "copy of bf16"
        share = rate / (2 * sizes[copy.removeprefix("copy of ")] / seconds[copy]) if copy in seconds else None
        speed = seconds["bf16"] / seconds[name] if "bf16" in seconds else None
        results[name] = {"bytes": size, "seconds": seconds[name], "share_of_copy": share, "speed_to_bf16": speed}
        shown = ["-" if x is None else f"{x:.2f}" for x in (share, speed)]
        table.add_row(name, f"{size / 1e6:.1f}", f"{seconds[name] * 1e3:.3f}", f"{rate / 1e9:.1f}", *shown)
    console.print(table)
    return results


def decode_call(batch: Batch) -> Callable[[], jax.Array]:
    """Decode attention of the batch, jitted, its inputs on the device."""
    attend = jax.jit(functools.partial(paged_attention, batch.spec))
    q, tiles = jax.device_put((batch.q.astype(jnp.bfloat16), batch.tiles))
    return lambda: attend(q, batch.arena, tiles, 0).acc


def copy_call(num_bytes: int) -> Callable[[], jax.Array]:
    """Reads so many bytes and writes as many."""
    source = jnp.zeros(num_bytes // 4, jnp.uint32)
    copy = jax.jit(lambda x: x + jnp.uint32(1))
    return lambda: copy(source)


def jax_paged_attention(shape: Shape, rows: int, tokens: int, page_size: int) -> Callable[[], jax.Array] | None:
    """JAX's own decode kernel over a 16-bit cache of the same shape; None where it has none."""
    num_pages = rows * tokens // page_size
    pages = np.random.default_rng(0).permutation(num_pages).reshape(rows, -1).astype(np.int32)
    q = jnp.ones((rows, shape.heads, shape.head_dim), jnp.bfloat16)
    k, v = (jnp.ones((shape.kv_heads, num_pages, page_size, shape.head_dim), jnp.bfloat16) for _ in "kv")
    lengths = jnp.full(rows, tokens, jnp.int32)
    if jax.default_backend() == "tpu":
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as tpu_kernel

        call = jax.jit(functools.partial(tpu_kernel, pages_per_compute_block=max(1, 512 // page_size)))
        return lambda: call(q, k, v, lengths, pages)
    if jax.default_backend() == "gpu":
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as gpu_kernel

        return lambda: gpu_kernel(q, k, v, jnp.asarray(pages), lengths)
    return None


def _seconds(call: Callable[[], jax.Array], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


if __name__ == "__main__":
    main()

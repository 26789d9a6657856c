"""The results as one table for each operation: on the terminal, and as docs/aot.md."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.aot.results import Result
from benchmarks.aot.targets import MESH_TARGETS, TARGETS
from fineserve_jax.pallas_kernels.triton.launch_shape import MAX_ROWS

GPUS = {target.name for targets in (TARGETS, MESH_TARGETS) for target in targets["gpu"]}
Column = tuple[str, Callable[[Result], str]]


def _kernels(result: Result) -> str:
    return ", ".join(dict.fromkeys(kernel.name.split("__")[0] for kernel in result.kernels))


def _of_kernels(pick: Callable[..., int]) -> Callable[[Result], str]:
    """The largest number of each kernel, in the order of `_kernels`."""

    def text(result: Result) -> str:
        largest: dict[str, int] = {}
        for kernel in result.kernels:
            name = kernel.name.split("__")[0]
            largest[name] = max(largest.get(name, 0), pick(kernel))
        return " / ".join(f"{number:,}" for number in largest.values())

    return text


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{count} x {8 * width}" for width, count in sorted(counts.items(), reverse=True))


def _page_loads(result: Result) -> str:
    return "; ".join(_widths(kernel.page_loads) for kernel in result.kernels if kernel.page_loads)


def _rest_of_loads(result: Result) -> str:
    """Loads that are no page loads, of all kernels."""
    rest: dict[int, int] = {}
    for kernel in result.kernels:
        for counts, sign in ((kernel.arena_loads, 1), (kernel.page_loads or {}, -1), (kernel.other_loads, 1)):
            for width, count in counts.items():
                rest[width] = rest.get(width, 0) + sign * count
    return _widths({width: count for width, count in rest.items() if count > 0})


def _bytes(result: Result) -> str:
    if result.bytes is None:
        return ""
    traffic = result.bytes
    padding = f" + {traffic.padding:,}" if traffic.padding else ""
    return f"{traffic.moved:,} / {traffic.must:,}{padding} = {traffic.ratio:.3f}"


def _collectives(result: Result) -> str:
    if not result.operation.startswith("step over"):
        return ""
    return (
        ", ".join(f"{name} {size:,}" for name, size in result.collectives.items()) + f" / {result.collectives_must:,}"
    )


NAMES: tuple[Column, ...] = (
    ("model", lambda r: r.model),
    ("KV format", lambda r: r.formats),
    ("chip", lambda r: r.target),
)
STATE: tuple[Column, ...] = (
    ("compiled", lambda r: "no: " + r.error.splitlines()[0][:120] if r.error else f"{r.compile_s:.1f} s"),
)
GPU_COLUMNS: tuple[Column, ...] = (
    ("kernels", _kernels),
    ("registers", _of_kernels(lambda kernel: kernel.registers)),
    ("spilled bytes", _of_kernels(lambda kernel: kernel.spill_bytes)),
    ("shared memory", _of_kernels(lambda kernel: kernel.shared_bytes)),
    ("page loads x bits", _page_loads),
    ("other loads x bits", _rest_of_loads),
)
TPU_COLUMNS: tuple[Column, ...] = (
    ("kernels", _kernels),
    ("VMEM bytes", _of_kernels(lambda kernel: kernel.vmem_bytes)),
    ("code bytes", lambda r: f"{r.code_bytes:,}"),
)
LAST: tuple[Column, ...] = (
    ("temporary bytes", lambda r: f"{r.temp_bytes:,}"),
    ("bytes moved / must", _bytes),
    ("collectives' bytes / must", _collectives),
)


def sections(results: Sequence[Result]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Of each platform and operation a title, the heads of the columns and the rows."""
    for platform, own in (
        ("GPU", [r for r in results if r.target in GPUS]),
        ("TPU", [r for r in results if r.target not in GPUS]),
    ):
        for operation in dict.fromkeys(result.operation for result in own):
            rows = [result for result in own if result.operation == operation]
            columns = [*NAMES, *STATE, *(GPU_COLUMNS if platform == "GPU" else TPU_COLUMNS), *LAST]
            cells = [
                ["" if r.error and i > len(NAMES) else text(r) for i, (_, text) in enumerate(columns)] for r in rows
            ]
            used = [i for i in range(len(columns)) if any(row[i] for row in cells)]
            yield f"{platform}: {operation}", [columns[i][0] for i in used], [[row[i] for i in used] for row in cells]


def show(results: Sequence[Result], console: Console) -> None:
    """Prints the tables."""
    for title, heads, rows in sections(results):
        table = Table(title=title, title_justify="left")
        for head in heads:
            table.add_column(head)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def problem_lines(results: Sequence[Result]) -> list[str]:
    """What is wrong, one line each."""
    return [
        f"{r.operation}, {r.model}, {r.formats}, {r.target}: {problem}" for r in results for problem in r.problems()
    ]


def remark_lines(results: Sequence[Result]) -> list[str]:
    """What misses a goal without being wrong."""
    return [f"{r.operation}, {r.model}, {r.formats}, {r.target}: {remark}" for r in results for remark in r.remarks()]


INTRODUCTION = """\
# The kernels, compiled ahead of time

`make aot` writes this file. It compiles every operation, in each KV format alone and in several of them in one program,
for chips that need not be there: {targets}. On GPUs the figures are those of `ptxas -v` and of the PTX; on TPUs those
of the compiled program.

- **registers, spilled bytes, VMEM**: the largest figure of each kernel, in the order in which the kernels are named.
- **page loads**: instructions that load keys and values from the arena, times the bits a thread loads at once. They
  are told from loads of scales by compiling the same kernel for formats whose scales are constants.
- **bytes moved / must**: counted by walking the kernel's own code on a small batch (`benchmarks/aot/traffic.py`):
  bytes it loads or copies of the arena and of tables, over what the rows' pages and tables hold, plus what lies between
  in pages that are copied by whole units (TPU).
- **compiled**: seconds on the machine that wrote this, or why not.

`make aot` lowers every case, and hands to the chip's compiler those whose program, compiler or chip has changed since
`benchmarks/aot/saved` was written; `make aot AOT_OPTIONS=--all` compiles all of them.

The tables whose titles begin with "step over" are of whole steps that 8 chips compute together (`tensor_parallel=8`),
compiled by `benchmarks/aot/mesh.py`; temporary bytes are of each chip, and **collectives' bytes** what the compiled
program's collectives give each chip, over what it has to be given: the sums of the residual stream behind attention and
MLP, in f32, and once a step the embedded tokens and the logits of the sampled rows. GPUs' registers are not told there.

A failed compilation, a spill, a page load narrower than 128 bits, or a kernel that moves more than 1.05 times the bytes
it must (but for single tokens on TPUs, which copy whole tiles) is an error: {num_problems} here. So are more than 128
registers where a GPU decodes at head size 128; more of them at head size 64 are no error.

Ragged attention is counted on a few new tokens, which one program serves. On a GPU a program has up to {rows} rows,
queries times query heads of a KV head, and reads the tile's pages for them. For more rows pages are read again, from
the L2 cache mostly, since those programs run side by side: 32 queries of Qwen3-32B, whose group is 8, take 8 programs.
Programs of 64 rows were tried: compiled for an A100 they spill (212 bytes with 4 warps, 456 with 8).

Not in the table, because they are known to spill: requantizing to int4 pages of 64 tokens and more at head size 256 on
an A100 (1,144 bytes from bf16 to 64 tokens), and of 128 on either GPU. They compile, and a page is requantized once in
its life.
"""


def markdown(results: Sequence[Result]) -> str:
    """The contents of docs/aot.md."""
    targets = ", ".join(dict.fromkeys(result.target for result in results))
    problems, remarks = problem_lines(results), remark_lines(results)
    parts = [INTRODUCTION.format(targets=targets, num_problems=len(problems) or "none", rows=MAX_ROWS)]
    for title, lines in (("Errors", problems), ("Short of a goal", remarks)):
        if lines:
            parts.append(f"## {title}\n\n" + "".join(f"- {line}\n" for line in lines))
    for title, heads, rows in sections(results):
        lines = [f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *rows)]
        parts.append(f"## {title}\n\n" + "".join(lines))
    return "\n".join(parts)

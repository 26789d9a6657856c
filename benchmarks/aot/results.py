"""What is known of a compiled case, and what is wrong with it."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

PAGE_LOAD_BYTES = 16  # of one thread's load: 128 bits
MOST_EXTRA_TRAFFIC = 1.05  # bytes moved over bytes that must be
MOST_SMALL_COLLECTIVES = 4096  # bytes
DECODE_REGISTERS, DECODE_HEAD_DIM = 128, 128  # registers a thread, at this head size, in decode on sm_90a


@dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled program.

    Attributes:
        registers, spill_bytes: of a GPU's thread.
        shared_bytes: of a GPU's program.
        arena_loads: bytes a thread loads of the arena at once -> how many such instructions the kernel has.
        page_loads: of these, the loads of keys and values, not of scales and the like; None: not told apart.
        other_loads: the same of all else: tables, queries.
        vmem_bytes: of a TPU kernel.
    """

    name: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    arena_loads: dict[int, int] = field(default_factory=dict)
    page_loads: dict[int, int] | None = None
    other_loads: dict[int, int] = field(default_factory=dict)
    vmem_bytes: int = 0


@dataclass(frozen=True)
class Bytes:
    """Bytes of one launch on a small batch.

    Attributes:
        must: what the pages and the tables hold of the batch's tokens.
        padding: what lies between in those pages, because memory is copied by whole units (TPU).
        moved: what the kernels read of the arena and of tables.
        other: what they move besides: queries, partial and final results.
    """

    must: int
    padding: int
    moved: int
    other: int

    @property
    def ratio(self) -> float:
        return self.moved / (self.must + self.padding)


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        target, operation, model, formats: what was compiled for what.
        error: why it did not compile; "": it did.
        compile_s: seconds.
        kernels: the Pallas kernels in it.
        temp_bytes: memory of intermediate results.
        code_bytes: machine code.
        bytes: traffic; None: not counted.
        traffic_error: why traffic could not be counted.
        strict_bytes: whether `bytes` has to be within bounds.
        collectives: of a step over several chips, by kind of collective, bytes that it gives each chip.
        collectives_must: bytes that the chips have to be given.
        crashes: how often its compiler took its process along before it compiled.
        fingerprint: of what was compiled; "" after an error, so that it is compiled again.
    """

    target: str
    operation: str
    model: str
    formats: str
    head_dim: int
    error: str = ""
    compile_s: float = 0.0
    kernels: tuple[Kernel, ...] = ()
    temp_bytes: int = 0
    code_bytes: int = 0
    bytes: Bytes | None = None
    traffic_error: str = ""
    strict_bytes: bool = True
    collectives: dict[str, int] = field(default_factory=dict)
    collectives_must: int = 0
    crashes: int = 0
    fingerprint: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """The chip, and the title of the case."""
        return self.target, f"{self.operation}, {self.model}, {self.formats}"

    def is_of_same_program(self, other: "Result | None") -> bool:
        """Whether `other` is of the same program, compilers and chip, so that compiling again would find the same."""
        return other is not None and self.fingerprint == other.fingerprint != ""

    def problems(self) -> list[str]:
        """What is wrong, in words; nothing: the case is as it should be."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = [problem for kernel in self.kernels for problem in _kernel_problems(kernel)]
        found += [narrow for kernel in self.kernels if (narrow := _narrow_loads(kernel))]
        if self.head_dim == DECODE_HEAD_DIM:
            found += self._many_registers()
        sent = sum(self.collectives.values())
        if sent > MOST_EXTRA_TRAFFIC * self.collectives_must + MOST_SMALL_COLLECTIVES:
            found.append(f"collectives give each chip {sent:,} bytes where {self.collectives_must:,} have to be given")
        if self.traffic_error:
            found.append(f"its traffic cannot be counted: {self.traffic_error}")
        if self.bytes is not None and self.strict_bytes and self.bytes.ratio > MOST_EXTRA_TRAFFIC:
            found.append(
                f"moves {self.bytes.moved:,} bytes where pages and tables hold {self.bytes.must:,} (and "
                f"{self.bytes.padding:,} of padding): {self.bytes.ratio:.2f} times as many, not {MOST_EXTRA_TRAFFIC}"
            )
        return found

    def remarks(self) -> list[str]:
        """What is beyond a goal but no error."""
        crashed = [f"its compiler crashed first, {self.crashes} times of {self.crashes + 1}"] if self.crashes else []
        return crashed + (self._many_registers() if self.head_dim < DECODE_HEAD_DIM else [])

    def _many_registers(self) -> list[str]:
        if self.operation != "decode" or self.target != "H100":
            return []
        return [
            f"{kernel.name} takes {kernel.registers} registers, more than {DECODE_REGISTERS}"
            for kernel in self.kernels
            if kernel.registers > DECODE_REGISTERS
        ]


def _kernel_problems(kernel: Kernel) -> list[str]:
    found = []
    if kernel.spill_bytes:
        found.append(f"{kernel.name} spills {kernel.spill_bytes} bytes")
    if kernel.page_loads is not None and kernel.arena_loads and not kernel.page_loads:
        found.append(f"no page load was recognised in {kernel.name}")
    return found


def _narrow_loads(kernel: Kernel) -> str:
    narrow = {width: count for width, count in (kernel.page_loads or {}).items() if width < PAGE_LOAD_BYTES}
    widths = ", ".join(f"{count} of {8 * width} bits" for width, count in sorted(narrow.items()))
    return f"{kernel.name} has page loads narrower than 128 bits: {widths}" if widths else ""


def save(results: Iterable[Result], path: Path) -> None:
    """Writes results as JSON, a line each, so that a difference between two files shows which have changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dataclasses.asdict(result)) for result in results]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def load(path: Path) -> list[Result]:
    """The inverse of `save`."""
    return [_result(row) for row in json.loads(path.read_text())]


def _result(row: dict) -> Result:
    def widths(counts: dict[str, int] | None) -> dict[int, int] | None:
        return None if counts is None else {int(width): count for width, count in counts.items()}

    kernels = [
        Kernel(**kernel | {name: widths(kernel[name]) for name in ("arena_loads", "page_loads", "other_loads")})
        for kernel in row["kernels"]
    ]
    traffic = None if row["bytes"] is None else Bytes(**row["bytes"])
    return Result(**row | {"kernels": tuple(kernels), "bytes": traffic})

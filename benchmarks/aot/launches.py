"""One `pallas_call` as a walk through its grid sees it: operands, blocks of them on the chip, scratch memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.aot.lazy import Later, force
from benchmarks.aot.memories import Counts, Memory, keeps_values

Run = Callable[[Any, Sequence[Any], Sequence[Any]], list[Any]]  # a jaxpr, its constants, its arguments -> results


@dataclass
class KernelTraffic:
    """What one `pallas_call` moved between device memory and the cores, operand by operand, results last."""

    name: str
    operands: list[Counts] = field(default_factory=list)


class Launch:
    """The operands and scratch memory of one `pallas_call`."""

    def __init__(self, eqn: Any, inputs: list[Any]) -> None:
        params = eqn.params
        self.mapping, self.jaxpr = params["grid_mapping"], params["jaxpr"]
        self.grid = tuple(int(size) for size in self.mapping.grid)
        self.in_place = "triton" in type(params["compiler_params"]).__module__
        names = params["name"] or str(getattr(params.get("name_and_src_info"), "name", "kernel"))
        self.traffic = KernelTraffic(names)
        num_scalars, num_inputs = self.mapping.num_index_operands, self.mapping.num_inputs
        aliases = {out: source for source, out in params["input_output_aliases"]}
        operands = [self._operand(variable.aval, value) for variable, value in zip(eqn.invars, inputs, strict=True)]
        self.results = [
            self._operand(variable.aval, None) if i not in aliases else operands[aliases[i]]
            for i, variable in enumerate(eqn.outvars)
        ]
        self.scalars = operands[:num_scalars]
        for memory in self.scalars:  # copied once, before the kernel starts; reading them is free
            assert memory.counts is not None
            memory.counts.read, memory.counts = memory.nbytes, None
        self.operands = operands[num_scalars : num_scalars + num_inputs] + self.results
        first_scratch = num_scalars + len(self.operands)
        self.scratch = [memory_like(variable.aval) for variable in self.jaxpr.invars[first_scratch:]]
        self.buffers: list[tuple[tuple[int, ...], Memory] | None] = [None] * len(self.operands)
        self.num_inputs = num_inputs

    def _operand(self, aval: Any, value: Any) -> Memory:
        counts = Counts(f"operand {len(self.traffic.operands)}", np.dtype(aval.dtype), int(np.prod(aval.shape)))
        self.traffic.operands.append(counts)
        kept = keeps_values(np.dtype(aval.dtype)) and value is not None
        return Memory.of(aval.shape, aval.dtype, force(value) if kept else None, counts)

    def references(self, place: tuple[int, ...], run: Run) -> Iterator[Memory]:
        """What the kernel's references are at a place of the grid."""
        yield from self.scalars
        for i, (operand, block) in enumerate(zip(self.operands, self.mapping.block_mappings, strict=True)):
            yield self._block(place, run, i, operand, block)
        yield from self.scratch

    def _block(self, place: tuple[int, ...], run: Run, i: int, operand: Memory, block: Any) -> Memory:
        space = str(getattr(block.transformed_block_aval, "memory_space", "")).lower()
        if any(name in space for name in ("any", "hbm")) and not self.in_place:
            return operand
        index_map = block.index_map_jaxpr
        found = run(index_map.jaxpr, index_map.consts, [*map(np.int32, place), *self.scalars])
        index = tuple(int(force(part)) for part in found)
        if self.in_place:
            return _cut(operand, index, block.block_shape)
        held = self.buffers[i]
        if held is not None and held[0] == index:
            return held[1]
        part = _cut(operand, index, block.block_shape)
        buffer = Memory.of(part.shape, part.dtype)
        if i < self.num_inputs:
            part.copy_to(buffer)
        elif part.counts is not None:
            part.counts.written += part.nbytes
        self.buffers[i] = index, buffer
        return buffer


def _cut(operand: Memory, indices: Sequence[int], block_shape: Sequence[Any]) -> Memory:
    """The block of an operand at a block index; what lies outside the array repeats its edge."""
    shape, addresses = list(operand.shape), operand.addresses
    for axis, (index, size) in enumerate(zip(indices, block_shape, strict=True)):
        length = size if isinstance(size, int) else getattr(size, "block_size", 1)
        start = index if type(size).__name__ == "Element" else index * length
        if addresses is not None and (start, length) != (0, shape[axis]):
            addresses = np.take(addresses, np.clip(start + np.arange(length), 0, shape[axis] - 1), axis)
        shape[axis] = length
    kept = [axis for axis, size in enumerate(block_shape) if size is not None and type(size).__name__ != "Squeezed"]
    block = tuple(shape[axis] for axis in kept)
    return Memory(
        operand.dtype,
        block,
        operand.cells,
        None if addresses is None else addresses.reshape(block),
        operand.counts,
    )


def memory_like(aval: Any) -> Memory:
    """Scratch memory for a reference's aval. Semaphores keep no values."""
    try:
        return Memory.of(aval.shape, aval.dtype)
    except TypeError:
        return Memory.of(aval.shape, np.uint8)


def result_of(memory: Memory) -> Any:
    if memory.cells is not None:
        return memory.cells.reshape(memory.shape)
    return Later(lambda: np.zeros(memory.shape, memory.dtype))

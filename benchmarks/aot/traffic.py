"""Counts the bytes that a Pallas kernel moves, by walking its jaxpr on one batch.

Every load, store and asynchronous copy is counted as the kernel's own code makes it: as many times as its loops run,
with the elements its mask lets through. No formula of the design enters, so a kernel that reads scales once a token
where a page has one, or reads a page twice, is found out.

Arithmetic is lazy. What decides where a kernel goes (page tables, lengths, masks) is computed; products and sums of
keys and values never are.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.aot.launches import KernelTraffic, Launch, memory_like, result_of
from benchmarks.aot.lazy import Later, force, later_results, settle
from benchmarks.aot.memories import Memory

Values = dict[Any, Any]


def count_traffic(function: Callable[..., Any], *arguments: Any) -> list[KernelTraffic]:
    """What each Pallas kernel that `function(*arguments)` launches moves.

    Args:
        arguments: pytrees of arrays; a `jax.ShapeDtypeStruct` stands for an array whose values decide nothing.
    """
    walk = _Walk()
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = [_concrete(leaf) for leaf in jax.tree.leaves(arguments)]
    walk.run(closed.jaxpr, closed.consts, leaves)
    return walk.kernels


def _concrete(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Later(lambda: np.zeros(leaf.shape, leaf.dtype))
    return np.asarray(leaf)


class _Walk:
    """Interprets jaxprs; `grid` is the place in the grid of the kernel that is being walked."""

    def __init__(self) -> None:
        self.kernels: list[KernelTraffic] = []
        self.grid: tuple[int, ...] = ()
        self.grid_size: tuple[int, ...] = ()
        self.used: set[Any] = set()
        self.seen: dict[int, Any] = {}
        self.handlers: dict[str, Callable[[Any, list[Any]], Sequence[Any]]] = {
            "pallas_call": self._pallas_call,
            "program_id": lambda eqn, _: [np.int32(self.grid[eqn.params["axis"]])],
            "num_programs": lambda eqn, _: [np.int32(self.grid_size[eqn.params["axis"]])],
            "get": self._get,
            "swap": self._swap,
            "masked_load": self._masked_load,
            "masked_swap": self._masked_swap,
            "load": self._masked_load,
            "store": self._masked_swap,
            "dma_start": self._dma_start,
            "cond": self._cond,
            "while": self._while,
            "scan": self._scan,
            "run_scoped": self._run_scoped,
        }

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr, lazily; its accesses to memory at once."""
        values: Values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def read(atom: Any) -> Any:
            return np.asarray(atom.val) if hasattr(atom, "val") else values[atom]

        self.used |= self._read_in(jaxpr)
        for eqn in jaxpr.eqns:
            results = self._eqn(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=False))
        return [read(atom) for atom in jaxpr.outvars]

    def _read_in(self, jaxpr: Any) -> set[Any]:
        """The variables that a jaxpr's equations and results read; of each jaxpr once."""
        if id(jaxpr) in self.seen:
            return set()
        self.seen[id(jaxpr)] = jaxpr  # kept, so that no other takes its id
        atoms = itertools.chain(jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
        return {atom for atom in atoms if not hasattr(atom, "val")}

    def _eqn(self, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        handler = self.handlers.get(name)
        if handler is not None and (name not in ("cond", "while", "scan") or _touches_memory(eqn)):
            return handler(eqn, inputs)
        inner = _inlined(eqn)
        if inner is not None:
            return self.run(inner.jaxpr, inner.consts, inputs)
        if not eqn.outvars:  # waits, signals, prints
            return []
        if any(isinstance(value, Memory) for value in inputs):
            raise NotImplementedError(f"the traffic of the Pallas primitive {name!r} is not counted yet")
        return later_results(eqn, inputs)

    # -- memory ------------------------------------------------------------------------------------------------

    def _get(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        memory, *indices = inputs
        return [memory.view(jax.tree.unflatten(eqn.params["tree"], indices), force).load()]

    def _swap(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        memory, value, *indices = inputs
        return self._exchange(eqn, memory.view(jax.tree.unflatten(eqn.params["tree"], indices), force), value, None)

    def _masked_load(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        memory, transforms, mask, _ = jax.tree.unflatten(eqn.params["args_tree"], inputs)
        return [memory.view(transforms, force).load(None if mask is None else force(mask))]

    def _masked_swap(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        memory, transforms, value, mask = jax.tree.unflatten(eqn.params["args_tree"], inputs)
        return self._exchange(eqn, memory.view(transforms, force), value, mask)

    def _exchange(self, eqn: Any, view: Memory, value: Any, mask: Any) -> list[Any]:
        # A store is an exchange whose result nobody looks at: no load.
        before = view.load() if eqn.outvars[0] in self.used else None
        view.store(value, force, None if mask is None else force(mask))
        return [before]

    def _dma_start(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        source, target, *_ = jax.tree.unflatten(eqn.params["tree"], inputs)
        source, target = (
            part if isinstance(part, Memory) else part.ref.view(part.transforms, force) for part in (source, target)
        )
        source.copy_to(target)
        return []

    def _run_scoped(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        jaxpr = eqn.params["jaxpr"]
        scratch = [memory_like(variable.aval) for variable in jaxpr.invars]
        return self.run(jaxpr, inputs, scratch)

    # -- control flow ------------------------------------------------------------------------------------------

    def _cond(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        index, *arguments = inputs
        branches = eqn.params["branches"]
        branch = branches[int(np.clip(int(force(index)), 0, len(branches) - 1))]
        return self.run(branch.jaxpr, branch.consts, arguments)

    def _while(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        split = eqn.params["cond_nconsts"]
        carry_at = split + eqn.params["body_nconsts"]
        cond_consts, body_consts, carry = inputs[:split], inputs[split:carry_at], inputs[carry_at:]
        while force(self.run(cond.jaxpr, cond.consts, [*cond_consts, *carry])[0]):
            carry = settle(body.jaxpr.outvars, self.run(body.jaxpr, body.consts, [*body_consts, *carry]))
        return carry

    def _scan(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        params, body = eqn.params, eqn.params["jaxpr"]
        split = params["num_consts"]
        carry_at = split + params["num_carry"]
        consts, carry, xs = inputs[:split], inputs[split:carry_at], [force(x) for x in inputs[carry_at:]]
        rows: list[list[Any]] = []
        steps = range(params["length"])
        for step in reversed(steps) if params["reverse"] else steps:
            results = self.run(body.jaxpr, body.consts, [*consts, *carry, *(x[step] for x in xs)])
            carry = settle(body.jaxpr.outvars, results[: params["num_carry"]])
            rows.append(results[params["num_carry"] :])
        ordered = rows[::-1] if params["reverse"] else rows
        return [*carry, *map(_stack, zip(*ordered, strict=True))]

    # -- kernels -----------------------------------------------------------------------------------------------

    def _pallas_call(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        launch = Launch(eqn, inputs)
        self.kernels.append(launch.traffic)
        outer = self.grid, self.grid_size
        self.grid_size = launch.grid
        for self.grid in itertools.product(*(range(size) for size in launch.grid)):
            self.run(launch.jaxpr, [], list(launch.references(self.grid, self.run)))
        self.grid, self.grid_size = outer
        return [result_of(memory) for memory in launch.results]


def _touches_memory(eqn: Any) -> bool:
    """Whether an equation contains an access to a reference, or a kernel."""
    return bool(eqn.effects) or any(_contains_kernel(inner) for inner in jax.core.jaxprs_in_params(eqn.params))


def _contains_kernel(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "pallas_call" or any(map(_contains_kernel, jax.core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _inlined(eqn: Any) -> Any:
    """The jaxpr that a call-like equation stands for."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if inner is not None and hasattr(inner, "consts") and eqn.primitive.name not in ("while", "scan"):
            return inner
    return None


def _stack(rows: Sequence[Any]) -> Later:
    return Later(lambda: np.stack([force(row) for row in rows]))

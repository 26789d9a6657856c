"""The compiled programs of steps of one spec, and how what they take lies on the devices."""

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from fineserve_jax.request.logits_processor import LogitsProcessor
from fineserve_jax.runner import step as stages
from fineserve_jax.runner.ahead import CompileAhead
from fineserve_jax.runner.mesh import SAME, SHARDED, DeviceGroup, Specs, over_mesh, specs_of
from fineserve_jax.runner.packing import pack, unpack
from fineserve_jax.runner.programs import compile_counted
from fineserve_jax.runner.shapes import StepSpec


@functools.cache
def step_programs(spec: StepSpec) -> "StepPrograms":
    """The programs of a spec; engines of one model on the same devices share them."""
    return StepPrograms(spec)


class StepPrograms:
    """The jitted stages of steps of one spec.

    Attributes:
        compiled: the stage of each program that was compiled, or loaded from JAX's compilation cache.
        layers: a layer of each group, with RoPE and without.
    """

    def __init__(self, spec: StepSpec) -> None:
        self.compiled: list[str] = []
        self._spec = spec
        self._processed_heads: dict[tuple[LogitsProcessor, ...], Callable[..., Any]] = {}
        program, params = self._program, specs_of(spec.model.config)
        self.embed = program(stages.embed, [params, SAME])
        self.head = program(stages.head, [params, SAME, SAME, SAME, SAME])
        self.layers = {
            kind: program(stages.layer, [params, SAME, SAME, SHARDED, SAME, SAME], (SAME, SHARDED), static=kind)
            for kind in itertools.product(range(len(spec.groups)), (True, False))
        }
        self.hidden = program(stages.hidden, [SAME, SAME])
        self.take_tokens = program(stages.take_tokens, [SAME, SAME, SAME])  # where steps are called ahead of others
        self.score = program(stages.score, [params, SAME, SAME])
        self.pool = program(stages.pool, [params, SAME, SAME])
        self.commit = program(stages.commit, [SHARDED, SHARDED, SAME], SHARDED, donate_argnums=(0,))
        self.finite_slots = program(stages.finite_slots, [SAME])  # only where `check_finite` asks for it
        self._unpack = compile_counted(unpack, lambda: self.compiled.append("inputs"), static_argnums=(1, 2))

    def _program(
        self,
        stage: Callable[..., Any],
        arguments: Sequence[Specs],
        result: Any = SAME,
        static: Sequence[Any] = (),
        donate_argnums: Sequence[int] = (),
    ) -> Callable[..., Any]:
        """`arguments`, `result`: how they lie on several devices."""
        function = over_mesh(self._spec.mesh, functools.partial(stage, self._spec, *static), arguments, result)
        note = functools.partial(self.compiled.append, stage.__name__)
        return compile_counted(function, note, donate_argnums)

    def processed_head(self, processors: tuple[LogitsProcessor, ...]) -> Callable[..., Any]:
        """`step.processed_head` with these processors."""
        if processors not in self._processed_heads:
            arguments: list[Specs] = [specs_of(self._spec.model.config), *(SAME,) * 6]
            self._processed_heads[processors] = self._program(
                stages.processed_head, arguments, static=[processors], donate_argnums=(5,)
            )
        return self._processed_heads[processors]

    def stand_ins(self, ahead: CompileAhead) -> "StepPrograms":
        """The same, but that calls only have programs compiled, see `CompileAhead`."""
        own = copy.copy(self)
        own.layers = {kind: ahead.stand_in(layer) for kind, layer in self.layers.items()}
        for name in ("embed", "head", "hidden", "take_tokens", "score", "pool", "commit", "finite_slots", "_unpack"):
            setattr(own, name, ahead.stand_in(getattr(self, name)))
        return own

    def put(self, group: DeviceGroup, tree: Any) -> Any:
        """A tree of numpy arrays, the same on all devices of the group, in one transfer to each."""
        packed = pack(tree)
        return self._unpack(group.put(packed.words), packed.layout, packed.tree)

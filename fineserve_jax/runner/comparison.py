"""How far apart what follows a token is in two runs, from what the last layer gave in each."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int32

from fineserve_jax.models import CausalLM, Params
from fineserve_jax.runner.mesh import SAME, Specs, over_mesh, specs_of
from fineserve_jax.runner.programs import compile_counted
from fineserve_jax.runner.scoring import most_slots

Array = Any  # numpy on the host, jax.Array in the program
Hidden = Float32[jax.Array, "T hidden"]


class Differences(NamedTuple):
    """Of T positions.

    Attributes:
        kl: f32[T], Kullback-Leibler divergence of the second run's probabilities from the first's, in nats.
        same_top: bool[T], whether the likeliest token is the same.
        logprobs: f32[2, T], of the token that does follow, in each run.
    """

    kl: Array
    same_top: Array
    logprobs: Array


Head = tuple[CausalLM, Params]


def compare(
    model: CausalLM,
    params: Params,
    first: np.ndarray,
    second: np.ndarray,
    targets: np.ndarray,
    other: Head | None = None,
    mesh: Mesh | None = None,
) -> Differences:
    """Compares two runs over the same tokens, a tile of positions at a time.

    Args:
        model, params: of the first run, and of the second unless `other` is given.
        first, second: f32[positions, hidden], what the last layer gave in each run.
        targets: i32[positions], the tokens that follow.
        other: the second run's model and params, with the same vocabulary.
        mesh: of the devices that have the parameters; None: one has.
    """
    other_model, other_params = other or (model, params)
    size, program = most_slots(model.config.vocab_size), _program(model, other_model, mesh)
    parts = []
    for start in range(0, len(targets), size):
        own = slice(start, start + size)
        padding = size - len(targets[own])
        rows = [np.pad(hidden[own], ((0, padding), (0, 0))) for hidden in (first, second)]
        parts.append(jax.device_get(program((params, other_params), *rows, np.pad(targets[own], (0, padding)))))
    columns = (np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))
    return Differences(*(column[..., : len(targets)] for column in columns))


@functools.cache
def _program(first: CausalLM, second: CausalLM, mesh: Mesh | None) -> Callable[..., Differences]:
    def specs_of_both(params: tuple[Params, Params]) -> Any:
        return tuple(specs_of(model.config)(own) for model, own in zip((first, second), params, strict=True))

    arguments: list[Specs] = [specs_of_both, SAME, SAME, SAME]
    compare_both = functools.partial(_compare, (first, second))
    return compile_counted(over_mesh(mesh, compare_both, arguments, SAME), lambda: None)


def _compare(
    models: tuple[CausalLM, CausalLM],
    params: tuple[Params, Params],
    first: Hidden,
    second: Hidden,
    targets: Int32[jax.Array, " T"],
) -> Differences:
    runs = zip(models, params, (first, second), strict=True)
    logits: list[Any] = [model.apply({"params": own}, hidden, method="head") for model, own, hidden in runs]
    of_first, of_second = (jax.nn.log_softmax(part, axis=-1) for part in logits)
    kl = jnp.sum(jnp.exp(of_first) * (of_first - of_second), axis=-1)
    top = [jnp.argmax(part, axis=-1) for part in logits]
    of_targets = [jnp.take_along_axis(part, targets[:, None], axis=-1)[:, 0] for part in (of_first, of_second)]
    return Differences(kl, top[0] == top[1], jnp.stack(of_targets))

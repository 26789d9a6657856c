"""Logits processors inside the jitted step: the states of their rows go on by a token, and the logits through them.

Their states lie in tables on the device (`processor_states`), and rows name places in them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.request.logits_processor import LogitsProcessor

Array = Any  # numpy on the host, jax.Array in the step


class ProcessorRows(NamedTuple):
    """Which rows of a step one processor works on.

    Attributes:
        places: i32[S], of each row's state in the processor's table; 0 where it has none, which is nobody's.
        has_token: bool[S], whether a token is yet to be added to the state.
        tokens: i32[S], that token.
    """

    places: Array
    has_token: Array
    tokens: Array


class Processing(NamedTuple):
    """What the processors of a step do.

    Attributes:
        rows: of each processor.
        order: i32[S, MAX_LOGITS_PROCESSORS], the numbers of the processors that each row goes through; -1 behind them.
        num_rounds: i32[], most processors of any row.
    """

    rows: tuple[ProcessorRows, ...]
    order: Array
    num_rounds: Array


def process(
    processors: Sequence[LogitsProcessor], logits: jax.Array, tables: Sequence[Any], processing: Processing
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The logits as the processors leave them, f32[S, vocab], and the tables with the states that rows have now.

    Rows whose logits are not finite stay so, whatever a processor makes of them.
    """
    states = tuple(map(_advanced, processors, tables, processing.rows))

    def apply_next(number: jax.Array, logits: jax.Array) -> jax.Array:
        for index, (processor, own) in enumerate(zip(processors, states, strict=True)):
            logits = _apply_to(processor, own, processing.order[:, number] == index, logits)
        return logits

    processed = lax.fori_loop(0, processing.num_rounds, apply_next, logits)
    is_finite = jnp.isfinite(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.where(is_finite, processed, logits), tuple(map(_put_back, tables, states, processing.rows))


def advance(processor: LogitsProcessor, state: Any, token: jax.Array) -> Any:
    """The state of one row with a token more, of the dtypes that it had."""
    return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), state, processor.update(state, token))


def _advanced(processor: LogitsProcessor, table: Any, rows: ProcessorRows) -> Any:
    """The states of the rows, with the tokens that are yet to be added."""
    before = jax.tree.map(lambda array: array[rows.places], table)
    after = jax.vmap(lambda state, token: advance(processor, state, token))(before, rows.tokens)
    return jax.tree.map(lambda old, new: jnp.where(_as_wide(rows.has_token, old), new, old), before, after)


def _apply_to(processor: LogitsProcessor, states: Any, is_next: jax.Array, logits: jax.Array) -> jax.Array:
    """The logits, those of the rows `is_next` through the processor."""

    def applied() -> jax.Array:
        return jnp.where(is_next[:, None], jax.vmap(processor.apply)(states, logits), logits)

    return lax.cond(is_next.any(), applied, lambda: logits)


def _put_back(table: Any, states: Any, rows: ProcessorRows) -> Any:
    return jax.tree.map(lambda array, own: array.at[rows.places].set(own), table, states)


def _as_wide(mask: jax.Array, array: jax.Array) -> jax.Array:
    """bool[S] with as many axes as an array of rows."""
    return mask.reshape(mask.shape + (1,) * (array.ndim - 1))

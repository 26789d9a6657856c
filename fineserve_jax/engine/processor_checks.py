"""What can be wrong with a request's logits processors before it waits: their arguments, and what they give."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fineserve_jax.engine.build import KnownModel
from fineserve_jax.errors import RequestError
from fineserve_jax.request.logits_processor import LogitsProcessor, get_logits_processor
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.processor_states import start_state
from fineserve_jax.validation import shortened, shown

ROWS = 2  # that functions are tried with, as shapes alone: in a step they are mapped over rows

_shapes: dict[tuple[LogitsProcessor, int], Any] = {}
"""Of a processor and a vocabulary's size, the shapes of the first state that was good: all others must have them."""


def check_logits_processors(served: KnownModel, token_ids: Sequence[int], sampling: SamplingParams) -> None:
    """Raises `RequestError` for processors that are not known here, that refuse their arguments, or that cannot be
    compiled into a step."""
    if sampling.logits_processors and served.config.reproducible:
        raise RequestError(
            f"logits_processors={list(sampling.logits_processors)}: requests that share a step with such are computed "
            "by another program, and the engine is reproducible; leave them out, or use an engine that is not"
        )
    vocab_size = served.model.config.vocab_size
    for name, arguments in sampling.logits_processors.items():
        try:
            processor = get_logits_processor(name)
        except ValueError as error:
            raise RequestError(str(error)) from None
        try:
            state = start_state(processor, token_ids, vocab_size, arguments)
        except Exception as error:  # it is somebody else's code
            raise RequestError(f"logits processor {name!r} refuses {shown(arguments)}: {_told(error)}") from error
        _check_shapes(processor, vocab_size, state)


def _check_shapes(processor: LogitsProcessor, vocab_size: int, state: Any) -> None:
    own, key = _shapes_of(state), (processor, vocab_size)
    if key not in _shapes:
        _check_functions(processor, vocab_size, state)
    if (first := _shapes.setdefault(key, own)) != own:
        raise RequestError(
            f"logits processor {processor.name!r} starts with {_in_words(own)}, and did with {_in_words(first)} for an "
            "earlier request; shapes and dtypes must be the same for all prompts and arguments"
        )


def _check_functions(processor: LogitsProcessor, vocab_size: int, state: Any) -> None:
    """Traces both functions, which runs nothing."""
    states = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((ROWS, *leaf.shape), leaf.dtype), state)
    tokens = jax.ShapeDtypeStruct((ROWS,), np.int32)
    logits = jax.ShapeDtypeStruct((ROWS, vocab_size), np.float32)
    for name, argument, wanted in (("update", tokens, states), ("apply", logits, logits)):
        what, function = f"{name}() of logits processor {processor.name!r}", getattr(processor, name)
        try:
            given = jax.eval_shape(jax.vmap(function), states, argument)
        except Exception as error:
            raise RequestError(f"{what} cannot be compiled: {_told(error)}") from error
        if _shapes_of(given) != _shapes_of(wanted):
            raise RequestError(
                f"{what} gives {_in_words(_shapes_of(given))} for {ROWS} rows; it must give "
                f"{_in_words(_shapes_of(wanted))}"
            )


def _shapes_of(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.dtype(leaf.dtype).name, tuple(leaf.shape)) for leaf in leaves)


def _in_words(shapes: Any) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for dtype, shape in shapes[1]) or "no arrays"


def _told(error: Exception) -> str:
    return shortened(f"{type(error).__name__}: {error}")

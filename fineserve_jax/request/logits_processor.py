"""Logits processors: steps of the sampler that come from outside, and their registry.

A package can offer one as an entry point of `fineserve_jax.logits_processors`: its name, and where the processor is, or
what makes it.
"""

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

ENTRY_POINTS = "fineserve_jax.logits_processors"


class LogitsProcessor:
    """What is done to a request's logits before anything else is, and what has to be known for that.

    Subclass it and register one object. Its state is a tree of arrays for each request that names it, and a function of
    the request's tokens alone: `start` gives the state behind a prompt, `update` takes it one token further. So it is
    the same wherever a request goes on: in another batch, after it has lost its memory, or resumed by another process.

    `update` and `apply` are pure functions, traced by JAX and compiled into the step for all its rows at once. What a
    request asks for goes into the state, so that no program is compiled for it.

    Attributes:
        name: what requests call it.
    """

    name: str

    def start(self, prompt: Sequence[int], vocab_size: int, *_: Any, **arguments: Any) -> Any:
        """The state behind a prompt: numbers and arrays of numpy, of the same shapes and dtypes whatever is given.

        Args:
            prompt: its token ids.
            vocab_size: of the model.
            arguments: as the request gives them. Take those there are by name, and raise `ValueError` for a bad value:
                the request is refused with what it says.
        """
        return ()

    def update(self, state: Any, token: Any) -> Any:
        """The state with a token more. `token`: i32[], the one that was sampled."""
        return state

    def apply(self, state: Any, logits: Any) -> Any:
        """f32[vocab], what the next token is chosen by. `logits`: f32[vocab], as the model gives them, or as the
        processors leave them that the request names before this one; minus infinity bans a token."""
        raise NotImplementedError(f"logits processor {self.name!r} has no apply()")


PROCESSORS: dict[str, LogitsProcessor] = {}
"""Those that are registered, by name."""


def register(processor: LogitsProcessor) -> LogitsProcessor:
    """Makes a processor known, under its name.

    Raises:
        ValueError: it is none, or another one has the name.
    """
    if not isinstance(processor, LogitsProcessor) or not isinstance(getattr(processor, "name", None), str):
        raise ValueError(f"{processor!r} is no LogitsProcessor with a name; register an object of a subclass of it")
    if PROCESSORS.setdefault(processor.name, processor) is not processor:
        raise ValueError(f"a logits processor named {processor.name!r} is registered already; choose another name")
    return processor


def known_logits_processors() -> list[str]:
    """Names of all that requests can name, those that installed packages offer included."""
    return sorted(PROCESSORS.keys() | entry_points(group=ENTRY_POINTS).names)


def get_logits_processor(name: str) -> LogitsProcessor:
    """The processor called `name`: a registered one, or what an installed package offers.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    if name not in PROCESSORS:
        _register_offered(name)
    return PROCESSORS[name]


def _register_offered(name: str) -> None:
    offered = entry_points(group=ENTRY_POINTS)
    if name not in offered.names:
        known = ", ".join(known_logits_processors()) or "none"
        raise ValueError(f"unknown logits processor {name!r}; known: {known}; register_logits_processor adds one")
    found = offered[name].load()
    processor = found() if callable(found) else found
    if not isinstance(processor, LogitsProcessor) or getattr(processor, "name", None) != name:
        raise ValueError(
            f"entry point {name!r} of {ENTRY_POINTS} is {found!r}, which is no LogitsProcessor of that name"
        )
    register(processor)

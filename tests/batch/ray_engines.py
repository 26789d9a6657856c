"""Engines in Ray's actors: they have to be found by name in other processes."""

import os
from collections.abc import Sequence
from pathlib import Path

from stub_engine import StubEngine

from fineserve_jax.request.request import Request


def noted_engine(folder: str, step_s: float = 0.0) -> StubEngine:
    """An engine without a model, whose process is known by a file in `folder`."""
    (Path(folder) / str(os.getpid())).touch()
    return StubEngine(4, step_s=step_s)


def deadly_engine(token: int) -> StubEngine:
    """One whose process dies of any prompt that begins with a token."""

    def die(requests: Sequence[Request]) -> None:
        if any(request.token_ids[0] == token for request in requests):
            os._exit(1)

    return StubEngine(4, fails=die)

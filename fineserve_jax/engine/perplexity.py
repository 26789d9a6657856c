"""Perplexity of a text through the engine's own cache: what a KV format or a weight precision costs in quality."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.engine.checks import check_memory, check_vocabulary
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import AUTO
from fineserve_jax.engine.page_shapes import bits_per_value
from fineserve_jax.engine.precision import Precision, resolve_precision
from fineserve_jax.engine.prepare import PreparedRequest
from fineserve_jax.engine.scoring import FOR_SCORES
from fineserve_jax.errors import ConfigError, NonFiniteError, RequestError
from fineserve_jax.request.request import PromptScores
from fineserve_jax.request.request_options import RequestOptions


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What was measured, and with what.

    Attributes:
        ppl: exp of the mean negative log-probability of the scored tokens.
        tokens: how many tokens were scored: all but the first of each window.
        window, windows: tokens of a window, and their number.
        kv_precision: KV format.
        bits_per_value: bits a cached key or value takes in it, scales and padding counted.
        model, weights: name of the model, and precision of its weights.
    """

    ppl: float
    tokens: int
    window: int
    windows: int
    kv_precision: str
    bits_per_value: float
    model: str
    weights: str

    def __str__(self) -> str:
        return (
            f"perplexity {self.ppl:.4f} over {self.tokens} tokens "
            f"({self.windows} windows of {self.window}); {self.kv_precision} KV at "
            f"{self.bits_per_value:.2f} bits a value, {self.model} in {self.weights}"
        )


def read_text(path: Path, window: int, windows: int) -> str:
    """The text to score. Raises `ConfigError` for an unreadable file, or for windows that make no sense."""
    if window < 2:
        raise ConfigError(f"window={window}: a window needs at least 2 tokens, one to score and one before it")
    if windows < 1:
        raise ConfigError(f"windows={windows}: at least 1 is needed")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the text {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text {path} is not UTF-8: {error}") from None


def measure_perplexity(
    engine: Engine,
    token_ids: Sequence[int],
    window: int = 1024,
    windows: int = 8,
    kv_precision: str | None = None,
    on_window: Callable[[int, float], None] | None = None,
    model: str | None = None,
) -> Perplexity:
    """Perplexity of the first `windows` consecutive runs of `window` tokens, each by itself.

    A token's score is its log-probability given the tokens of its window before it, whose keys and values are read as
    decoding would read them: in the KV format, its newest page in the format's residual precision if it has one.

    Args:
        engine: with nothing else to do meanwhile. Its `max_chunk_tokens` does not change the result.
        token_ids: the text, without special tokens.
        kv_precision: KV format; the model's own if None.
        on_window: called after each window with how many are done and the perplexity so far.
        model: whose; None for the only one there is.

    Raises:
        RequestError: too short a text, or windows that the engine cannot hold.
        NonFiniteError: a score that is NaN or infinite.
    """
    engine.recover()
    served = engine.served(model)
    kv_precision = kv_precision or served.config.kv_precision
    if kv_precision == AUTO:
        raise RequestError(f"kv_precision={AUTO!r} depends on what else is served; name the format to measure")
    precision = check_windows(engine, served, token_ids, window, windows, kv_precision)
    total, tokens = 0.0, 0
    for i in range(windows):
        part = list(token_ids[i * window : (i + 1) * window])
        try:
            scores = score_window(engine, served, part, precision).scores
        except NonFiniteError as error:
            raise NonFiniteError(f"window {i}: {error}") from None
        logprobs = np.array([entry.logprob for entry in scores.entries], np.float32)
        _check_finite(logprobs, served.name, i)
        total, tokens = total + float(logprobs.sum(dtype=np.float64)), tokens + logprobs.size
        if on_window is not None:
            on_window(i + 1, math.exp(-total / tokens))
    return Perplexity(
        ppl=math.exp(-total / tokens),
        tokens=tokens,
        window=window,
        windows=windows,
        kv_precision=kv_precision,
        bits_per_value=bits_per_value(engine.kv.class_of(served.name, kv_precision), served.geometry),
        model=served.name,
        weights=served.model.weights,
    )


def check_windows(
    engine: Engine, served: ServedModel, token_ids: Sequence[int], window: int, windows: int, kv_precision: str
) -> Precision:
    """The precision of the windows. Raises `RequestError` for windows that cannot be scored."""
    if window < 2 or windows < 1:
        raise RequestError(f"window={window}, windows={windows}: at least 2 tokens and 1 window are needed")
    if len(token_ids) < window * windows:
        raise RequestError(
            f"the text has {len(token_ids)} tokens, which is {len(token_ids) // window} windows of {window}; "
            f"{windows} were asked for: give a longer text, or fewer or shorter windows"
        )
    if window > served.max_seq_len:
        raise RequestError(f"window={window} is more than max_seq_len={served.max_seq_len}; shorten it or raise that")
    # As of a request of the window's length, which is never queued: it is scored in memory of its own.
    check_vocabulary(served, "prompt", token_ids[: window * windows])
    precision = resolve_precision(engine.kv, served.name, served.formats, kv_precision, None, window)
    check_memory(engine.kv, served.name, precision.start, window)
    return precision


class ScoredWindow(NamedTuple):
    """A window's scores, of each token but the first, and how many tokens were kept in each KV format at its end."""

    scores: PromptScores
    kv_tokens: dict[str, int]


def score_window(
    engine: Engine, served: ServedModel, token_ids: list[int], precision: Precision, keep_hidden: bool = False
) -> ScoredWindow:
    """Scores a window, and leaves no pages behind. `keep_hidden`: keep what the last layer gives, too.

    Raises:
        NonFiniteError: the model computed NaN or infinity.
    """
    prepared = PreparedRequest(
        served,
        token_ids,
        FOR_SCORES,
        RequestOptions(),
        precision,
        max_total_tokens=len(token_ids),
        stop_ids=frozenset(),
    )
    (request,) = engine.queue(prepared)
    request.shares_prefix = False
    scores = request.scores
    assert scores is not None, "they are asked for"
    if keep_hidden:
        scores.hidden = []
    try:
        while request.finish_reason is None:
            engine.step()
    finally:
        engine.abort(request)
        engine.release(request)
    if request.error is not None:
        raise request.error
    return ScoredWindow(scores, request.kv_tokens)


def _check_finite(logprobs: np.ndarray, model: str, window: int) -> None:
    """Raises `NonFiniteError` unless all scores of a window, and the perplexity that they give, are finite."""
    with np.errstate(over="ignore"):
        perplexity = np.exp(-logprobs.mean(dtype=np.float64))
    if not np.isfinite(perplexity):
        raise NonFiniteError(
            f"the perplexity of model {model!r} over window {window} is {perplexity}, its least log-probability being "
            f"{logprobs.min()}; the model's weights or its configuration are not right for the text"
        )

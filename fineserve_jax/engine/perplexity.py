"""Perplexity of a text through the engine's own cache: what a KV format or a weight precision costs in quality."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.engine.checks import check_memory, check_vocabulary
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import AUTO
from fineserve_jax.engine.nonfinite import where_from
from fineserve_jax.engine.precision import Precision, resolve_precision
from fineserve_jax.engine.prepare import use_precision
from fineserve_jax.errors import ConfigError, NonFiniteError, RequestError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.request import Request, RequestTimes, ScheduledChunk, SchedulerOutput
from fineserve_jax.sampling_params import SamplingParams

PAGES_AT_A_TIME = 32


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
    narrow_half_to: str | None = None,
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
        narrow_half_to: score only the second half of each window, its first half narrowed to this KV format before,
            as it is when memory is short, or left alone if that is `kv_precision`; None: score all of it.

    Raises:
        RequestError: too short a text, or windows that the engine cannot hold.
        NonFiniteError: a score that is NaN or infinite.
    """
    engine.recover()
    served = engine.served(model)
    kv_precision = kv_precision or served.config.kv_precision
    if kv_precision == AUTO:
        raise RequestError(f"kv_precision={AUTO!r} depends on what else is served; name the format to measure")
    precision = _check(engine, served, token_ids, window, windows, kv_precision)
    use_precision(served, engine.kv, precision)
    if narrow_half_to is not None:
        _use_narrowing(engine, served, window, kv_precision, narrow_half_to)
    total, tokens = 0.0, 0
    for i in range(windows):
        part = list(token_ids[i * window : (i + 1) * window])
        logprobs = _score_window(engine, served, part, kv_precision, narrow_half_to)
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
        bits_per_value=get_format(kv_precision).bits_per_value(served.geometry),
        model=served.name,
        weights=served.model.weights,
    )


def _use_narrowing(engine: Engine, served: ServedModel, window: int, kv_precision: str, narrow_to: str) -> None:
    """Makes the model's programs narrow the first half of windows. Raises `RequestError` where none can be."""
    steps = engine.kv.ladder(served.name, kv_precision, narrow_to)
    unchanged = len(steps) == 1 and narrow_to != kv_precision
    if unchanged or window < 2 * served.geometry.page_size:
        raise RequestError(
            f"half of a window of {window} tokens in {kv_precision} cannot be narrowed to {narrow_to}; give a "
            f"narrower format, and windows of at least {2 * served.geometry.page_size} tokens"
        )
    served.runner.use_formats(step.kv_format for step in steps)
    served.runner.use_narrowing()


def _check(
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


def _score_window(
    engine: Engine, served: ServedModel, token_ids: list[int], kv_precision: str, narrow_to: str | None
) -> np.ndarray:
    """f32[...], log-probability of each token but the first, or of those in the second half. Leaves no pages behind."""
    kv, largest_chunk = engine.kv, served.runner.chunk_buckets[-1]
    half = len(token_ids) // 2 // served.geometry.page_size * served.geometry.page_size
    request = Request(
        request_id="perplexity",
        model=served.name,
        kv_precision=kv_precision,
        min_kv_precision=narrow_to,
        sampling=SamplingParams(),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        max_total_tokens=len(token_ids),
        sequence=0,
        times=RequestTimes(engine.clock()),
        shares_prefix=False,
        long_after=served.model.config.long_after,
    )
    if not kv.grow(request, len(token_ids)):
        raise RequestError(f"no KV memory is free for a window of {len(token_ids)} tokens; let other requests finish")
    parts = []
    try:
        while (count := min(largest_chunk, request.num_uncomputed_tokens)) > 1:  # a last token alone predicts nothing
            if narrow_to is not None and request.num_computed_tokens < half:
                count = min(count, half - request.num_computed_tokens)
            if not kv.grow(request, len(token_ids)):  # where there is a window, for this chunk
                raise RequestError(f"no KV memory is free for a window of {len(token_ids)} tokens; raise kv_memory")
            chunk = ScheduledChunk(request, request.num_computed_tokens, count)
            result = engine.execute(SchedulerOutput((), (chunk,)), scores=True)
            scores = result.scores
            for stage in result.nonfinite.values():
                where = f"at or behind token {chunk.start} of a window"
                raise NonFiniteError(f"model {served.name!r} computes NaN or infinity {where}; {where_from(stage)}")
            if scores is None:
                raise RuntimeError("the runner returned no scores although they were asked for")
            parts.append(scores[:count])
            request.num_computed_tokens += count
            if request.num_computed_tokens == half:
                _narrow_all(kv, request)
    finally:
        kv.release(request)
    return np.concatenate(parts)[0 if narrow_to is None else half : len(token_ids) - 1]


def _check_finite(logprobs: np.ndarray, model: str, window: int) -> None:
    """Raises `NonFiniteError` unless all scores of a window, and the perplexity that they give, are finite."""
    with np.errstate(over="ignore"):
        perplexity = np.exp(-logprobs.mean(dtype=np.float64))
    if not np.isfinite(perplexity):
        raise NonFiniteError(
            f"the perplexity of model {model!r} over window {window} is {perplexity}, its least log-probability being "
            f"{logprobs.min()}; the model's weights or its configuration are not right for the text"
        )


def _narrow_all(kv: KVManager, request: Request) -> None:
    """Narrow all that is computed of a request as far as it allows."""
    while (what := kv.next_requantization(request, PAGES_AT_A_TIME, 0)) is not None:
        if not kv.requantize_pages(request, what):
            raise RequestError(f"no KV memory is free to narrow pages to {what.target.kv_format}; raise kv_memory")

"""What KV formats cost: a text scored, and gone on with, in each of them and in a wide one.

Perplexity of windows of a text; how far probabilities are from the wide format's (KL divergence), and whether the
likeliest token is the same; how many tokens are the same when both go on greedily. With intervals, as a difference
is worth little without the noise that it is seen in.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import AUTO
from fineserve_jax.engine.perplexity import check_windows, score_window
from fineserve_jax.engine.precision import Precision
from fineserve_jax.errors import RequestError
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.request.request import Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.comparison import Differences, compare

WIDE = "fp32"
"""What formats are compared with."""
PROMPT_TOKENS = 128
"""Most tokens of a window that both formats go on from greedily."""
RESAMPLES, LEVEL = 2000, 0.95


class Estimate(NamedTuple):
    """A figure and its 95 % interval, a percentile bootstrap over windows (Efron, 1979)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class FormatQuality:
    """What a KV format costs.

    Attributes:
        kv_precision, bits_per_value: the format, and bits of a key or value in it, scales and padding counted.
        perplexity: of the text.
        rise: of the perplexity over the wide format's, 0.01 for 1 %; of the same windows, so that their differences
            cancel.
        kl: mean KL divergence of the format's probabilities from the wide one's, in nats a token.
        kl_p99: its 99th percentile over tokens.
        same_top: share of tokens at which the likeliest one is the same.
        same_greedy: tokens of a greedy answer up to the first that differs, all of them if none does.
    """

    kv_precision: str
    bits_per_value: float
    perplexity: Estimate
    rise: Estimate
    kl: Estimate
    kl_p99: Estimate
    same_top: Estimate
    same_greedy: Estimate


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured, and with what.

    Attributes:
        model, weights: name of the model, and precision of its weights.
        wide: the format that others are compared with; its perplexity is `wide_perplexity`.
        window, windows: tokens of a window, and their number.
        new_tokens: tokens of a greedy answer.
        formats: those that were measured, narrowest first.
    """

    model: str
    weights: str
    wide: str
    wide_perplexity: Estimate
    window: int
    windows: int
    new_tokens: int
    formats: tuple[FormatQuality, ...]

    def choice(self, max_rise: float) -> FormatQuality | None:
        """The narrowest format whose rise of perplexity, its whole interval, is at most that; None: there is none."""
        return next((found for found in self.formats if found.rise.high <= max_rise), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an estimate is {"value", "low", "high"}."""
        return _plain(asdict(self))


def measure_quality(
    engine: Engine,
    token_ids: Sequence[int],
    kv_precisions: Sequence[str],
    window: int = 1024,
    windows: int = 24,
    new_tokens: int = 64,
    on_window: Callable[[int], None] | None = None,
    seed: int = 0,
) -> Quality:
    """What KV formats cost on the first `windows` consecutive runs of `window` tokens of a text, each by itself.

    Args:
        engine: of one model, with nothing else to do meanwhile. It serves fp32, and has room for one window.
        token_ids: the text, without special tokens.
        kv_precisions: KV formats.
        new_tokens: tokens of greedy answers to the beginning of each window.
        on_window: called after each window with how many are done.
        seed: of the resampling.

    Raises:
        RequestError: too short a text, windows that the engine cannot hold, or fewer than 2, which have no interval.
        NonFiniteError: a score that is NaN or infinite.
    """
    engine.recover()
    served = engine.served()
    if windows < 2:
        raise RequestError(f"windows={windows}: at least 2 are needed, since intervals are told from their differences")
    if AUTO in kv_precisions:
        raise RequestError(f"kv_precision={AUTO!r} depends on what else is served; name the formats to measure")
    if not 1 <= new_tokens <= served.max_seq_len - min(window // 2, PROMPT_TOKENS):
        raise RequestError(f"new_tokens={new_tokens} behind half a window is none, or more than max_seq_len allows")
    names = [name for name in dict.fromkeys(kv_precisions) if name != WIDE]
    if not names:
        raise RequestError(f"kv_precisions={list(kv_precisions)}: give formats besides {WIDE}, to compare with it")
    precisions = {name: check_windows(engine, served, token_ids, window, windows, name) for name in (WIDE, *names)}
    names.sort(key=lambda name: get_format(name).bits_per_value(served.geometry))
    precisions = {name: precisions[name] for name in (WIDE, *names)}
    measured: dict[str, list[_Window]] = {name: [] for name in names}
    for i in range(windows):
        part = list(token_ids[i * window : (i + 1) * window])
        for name, found in _measure_window(engine, served, part, precisions, new_tokens).items():
            measured[name].append(found)
        if on_window is not None:
            on_window(i + 1)
    rng = np.random.default_rng(seed)
    draws = rng.integers(windows, size=(RESAMPLES, windows))
    return Quality(
        model=served.name,
        weights=served.model.weights,
        wide=WIDE,
        wide_perplexity=_estimate(draws, lambda own: _perplexity(own, 0), measured[names[0]]),
        window=window,
        windows=windows,
        new_tokens=new_tokens,
        formats=tuple(_format_quality(served, name, measured[name], draws) for name in names),
    )


class _Window(NamedTuple):
    """What a window says of a format: `Differences` from the wide one, and equal tokens of a greedy answer."""

    differences: Differences
    same_greedy: int


def _measure_window(
    engine: Engine, served: ServedModel, token_ids: list[int], precisions: Mapping[str, Precision], new_tokens: int
) -> dict[str, _Window]:
    """What a window says of each format but the wide one. `precisions`: of all, by the formats' names."""
    hidden = {}
    for name, precision in precisions.items():
        scores = score_window(engine, served, token_ids, precision, keep_hidden=True)
        hidden[name] = np.concatenate(scores.hidden or [])
    targets = np.array(token_ids[1:], np.int32)
    model, params, mesh = served.runner.model, served.runner.params, engine.arena.group.mesh
    answers = _greedy_answers(engine, token_ids[: min(len(token_ids) // 2, PROMPT_TOKENS)], precisions, new_tokens)
    found = {}
    for name in [name for name in precisions if name != WIDE]:
        differing = [a != b for a, b in zip(answers[WIDE], answers[name], strict=True)]
        same = differing.index(True) if True in differing else new_tokens
        found[name] = _Window(compare(model, params, hidden[WIDE], hidden[name], targets, mesh), same)
    return found


def _greedy_answers(
    engine: Engine, prompt: Sequence[int], names: Iterable[str], new_tokens: int
) -> dict[str, list[int]]:
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    requests = {name: engine.add_request(prompt, sampling, RequestOptions(kv_precision=name)) for name in names}
    try:
        while engine.has_unfinished:
            engine.step()
    finally:
        for request in requests.values():
            engine.abort(request)
            engine.release(request)
    return {name: _answer(request) for name, request in requests.items()}


def _answer(request: Request) -> list[int]:
    if request.error is not None:
        raise request.error
    return request.output_token_ids


def _format_quality(served: ServedModel, name: str, found: Sequence[_Window], draws: np.ndarray) -> FormatQuality:
    def mean_of(values: Callable[[_Window], np.ndarray | int]) -> Estimate:
        return _estimate(draws, lambda own: float(np.mean([np.mean(values(window)) for window in own])), found)

    return FormatQuality(
        kv_precision=name,
        bits_per_value=get_format(name).bits_per_value(served.geometry),
        perplexity=_estimate(draws, lambda own: _perplexity(own, 1), found),
        rise=_estimate(draws, lambda own: _perplexity(own, 1) / _perplexity(own, 0) - 1, found),
        kl=mean_of(lambda window: window.differences.kl),
        kl_p99=_estimate(
            draws, lambda own: float(np.quantile(np.concatenate([w.differences.kl for w in own]), 0.99)), found
        ),
        same_top=mean_of(lambda window: window.differences.same_top),
        same_greedy=mean_of(lambda window: window.same_greedy),
    )


def _perplexity(windows: Sequence[_Window], run: int) -> float:
    return math.exp(-float(np.mean([np.mean(w.differences.logprobs[run], dtype=np.float64) for w in windows])))


def _estimate(
    draws: np.ndarray, statistic: Callable[[Sequence[_Window]], float], windows: Sequence[_Window]
) -> Estimate:
    """A statistic of windows, and its interval: of windows drawn with replacement, as often as there are."""
    values = [statistic([windows[i] for i in draw]) for draw in draws]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(statistic(windows), float(low), float(high))


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value

"""What KV formats, `auto` under pressure and narrow weights cost: a text scored, and gone on with, in each of them and
in a wide format.

Perplexity of windows of a text; how far probabilities are from the wide format's (KL divergence), and whether the
likeliest token is the same; how many tokens are the same when both go on greedily. With intervals, as a difference
is worth little without the noise that it is seen in.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import AUTO
from fineserve_jax.engine.estimates import Estimate, draws_of, estimate
from fineserve_jax.engine.page_shapes import bits_per_value, bytes_per_token
from fineserve_jax.engine.perplexity import check_windows, score_window
from fineserve_jax.engine.precision import Precision
from fineserve_jax.engine.pressure import EngineUnderPressure
from fineserve_jax.errors import RequestError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.request.request import Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.comparison import Differences, compare

WIDE = "fp32"
"""What formats are compared with."""
PROMPT_TOKENS = 128
"""Most tokens of a window that both formats go on from greedily."""


@dataclass(frozen=True, slots=True)
class FormatQuality:
    """What a KV format costs, or `auto` under a pressure, or weights of a precision.

    Attributes:
        weights, kv_precision: precision of the weights, and the KV format, or "auto".
        bits_per_value: bits of a key or value in the format, scales and padding counted; under pressure the mean of
            what windows hold at their end.
        kv_bytes_per_token: bytes of a token's keys and values of all layers, likewise.
        perplexity: of the text.
        rise: of the perplexity over the wide format's, 0.01 for 1 %; of the same windows, so that their differences
            cancel.
        kl: mean KL divergence of the format's probabilities from the wide one's, in nats a token.
        kl_p99: its 99th percentile over tokens.
        same_top: share of tokens at which the likeliest one is the same.
        same_greedy: tokens of a greedy answer up to the first that differs, all of them if none does.
        pressure: how many times the memory that there is requests want, see `EngineUnderPressure`; None: no more.
    """

    weights: str
    kv_precision: str
    bits_per_value: float
    kv_bytes_per_token: float
    perplexity: Estimate
    rise: Estimate
    kl: Estimate
    kl_p99: Estimate
    same_top: Estimate
    same_greedy: Estimate
    pressure: float | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured, and with what.

    Attributes:
        model, weights: name of the model, and precision of its weights.
        wide: the format that others are compared with; its perplexity is `wide_perplexity`.
        page_size: tokens of a KV page.
        window, windows: tokens of a window, and their number.
        new_tokens: tokens of a greedy answer.
        formats: those that were measured, narrowest first, all with these weights.
        other_weights: the wide format with weights of other precisions.
        under_pressure: `auto` under each pressure, with these weights.
    """

    model: str
    weights: str
    wide: str
    wide_perplexity: Estimate
    page_size: int
    window: int
    windows: int
    new_tokens: int
    formats: tuple[FormatQuality, ...]
    other_weights: tuple[FormatQuality, ...] = ()
    under_pressure: tuple[FormatQuality, ...] = ()

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
    others: Sequence[Engine] = (),
    under_pressure: Sequence[EngineUnderPressure] = (),
) -> Quality:
    """What KV formats cost on the first `windows` consecutive runs of `window` tokens of a text, each by itself.

    Args:
        engine: of one model, with nothing else to do meanwhile. It serves fp32, and has room for one window.
        token_ids: the text, without special tokens.
        kv_precisions: KV formats.
        new_tokens: tokens of greedy answers to the beginning of each window.
        on_window: called after each window with how many are done.
        seed: of the resampling.
        others: engines of the same model with other weights, to be measured in fp32, with room for a window.
        under_pressure: engines of the same model and weights, to be measured in `auto`.

    Raises:
        RequestError: too short a text, windows that the engine cannot hold, or that a pressure is too much for, or
            fewer than 2, which have no interval.
        NonFiniteError: a score that is NaN or infinite.
    """
    engine.recover()
    served = engine.served()
    if windows < 2:
        raise RequestError(f"windows={windows}: at least 2 are needed, since intervals are told from their differences")
    if AUTO in kv_precisions:
        raise RequestError(
            f"kv_precision={AUTO!r} depends on how short memory is: name formats, and pressures to measure it under"
        )
    if not 1 <= new_tokens <= served.max_seq_len - min(window // 2, PROMPT_TOKENS):
        raise RequestError(f"new_tokens={new_tokens} behind half a window is none, or more than max_seq_len allows")
    names = [name for name in dict.fromkeys(kv_precisions) if name != WIDE]
    if not names:
        raise RequestError(f"kv_precisions={list(kv_precisions)}: give formats besides {WIDE}, to compare with it")
    precisions = {name: check_windows(engine, served, token_ids, window, windows, name) for name in (WIDE, *names)}
    names.sort(key=lambda name: bytes_per_token(engine.kv.class_of(served.name, name), served.geometry))
    subjects = [_Subject(engine, name, precisions[name]) for name in (WIDE, *names)]
    for other, name in (*((short, AUTO) for short in under_pressure), *((other, WIDE) for other in others)):
        other.recover()
        subjects.append(_Subject(other, name, check_windows(other, other.served(), token_ids, window, windows, name)))
        if isinstance(other, EngineUnderPressure):
            other.check_share(subjects[-1].precision, window)
    measured: list[list[_Window]] = [[] for _ in subjects[1:]]
    for i in range(windows):
        part = list(token_ids[i * window : (i + 1) * window])
        for own, found in zip(measured, _measure_window(subjects, part, new_tokens), strict=True):
            own.append(found)
        if on_window is not None:
            on_window(i + 1)
    draws = draws_of(windows, seed)
    rows = [_format_quality(*pair, draws) for pair in zip(subjects[1:], measured, strict=True)]
    in_auto = len(names) + len(under_pressure)
    return Quality(
        model=served.name,
        weights=served.model.weights,
        wide=WIDE,
        wide_perplexity=estimate(draws, lambda own: _perplexity(own, 0), measured[0]),
        page_size=served.geometry.page_size,
        window=window,
        windows=windows,
        new_tokens=new_tokens,
        formats=tuple(rows[: len(names)]),
        other_weights=tuple(rows[in_auto:]),
        under_pressure=tuple(rows[len(names) : in_auto]),
    )


class _Subject(NamedTuple):
    """What is measured: an engine, whose weights it is, and a KV format that it serves, or `auto`."""

    engine: Engine
    kv_precision: str
    precision: Precision

    @property
    def served(self) -> ServedModel:
        return self.engine.served()


class _Window(NamedTuple):
    """What a window says of a format: `Differences` from the wide one, equal tokens of a greedy answer, and how many of
    its tokens were kept in which format at its end."""

    differences: Differences
    same_greedy: int
    kv_tokens: dict[str, int]


def _measure_window(subjects: Sequence[_Subject], token_ids: list[int], new_tokens: int) -> list[_Window]:
    """What a window says of each subject but the first, the wide one."""
    scored = [score_window(s.engine, s.served, token_ids, s.precision, keep_hidden=True) for s in subjects]
    hidden = [np.concatenate(own.scores.hidden or []) for own in scored]
    targets = np.array(token_ids[1:], np.int32)
    answers = _greedy_answers(subjects, token_ids[: min(len(token_ids) // 2, PROMPT_TOKENS)], new_tokens)
    wide, found = subjects[0].served.runner, []
    mesh = subjects[0].engine.arena.group.mesh
    for i, (subject, answer) in enumerate(zip(subjects[1:], answers[1:], strict=True), 1):
        runner = subject.served.runner
        differing = [a != b for a, b in zip(answers[0], answer, strict=True)]
        same = differing.index(True) if True in differing else new_tokens
        other = None if runner.params is wide.params else (runner.model, runner.params)
        differences = compare(wide.model, wide.params, hidden[0], hidden[i], targets, other, mesh)
        found.append(_Window(differences, same, scored[i].kv_tokens))
    return found


def _greedy_answers(subjects: Sequence[_Subject], prompt: Sequence[int], new_tokens: int) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    requests: list[tuple[Engine, Request]] = []
    try:
        for subject in subjects:
            options = RequestOptions(kv_precision=subject.kv_precision)
            requests.append((subject.engine, subject.engine.add_request(prompt, sampling, options)))
        for engine in dict.fromkeys(subject.engine for subject in subjects):
            while engine.has_unfinished:
                engine.step()
    finally:
        for engine, request in requests:
            engine.abort(request)
            engine.release(request)
    return [_answer(request) for _, request in requests]


def _answer(request: Request) -> list[int]:
    if request.error is not None:
        raise request.error
    return request.output_token_ids


def _format_quality(subject: _Subject, found: Sequence[_Window], draws: np.ndarray) -> FormatQuality:
    def mean_of(values: Callable[[_Window], np.ndarray | int]) -> Estimate:
        return estimate(draws, lambda own: float(np.mean([np.mean(values(window)) for window in own])), found)

    served, engine = subject.served, subject.engine

    def mean_size(size: Callable[[PageClass, PageGeometry], float]) -> float:
        """Of what the tokens of windows are kept in."""
        kept = Counter({subject.kv_precision: 1})
        if isinstance(engine, EngineUnderPressure):
            kept = sum((Counter(window.kv_tokens) for window in found), Counter())
        sizes = {name: size(engine.kv.class_of(served.name, name), served.geometry) for name in kept}
        return sum(sizes[name] * count for name, count in kept.items()) / kept.total()

    return FormatQuality(
        weights=served.model.weights,
        kv_precision=subject.kv_precision,
        bits_per_value=mean_size(bits_per_value),
        kv_bytes_per_token=mean_size(bytes_per_token),
        perplexity=estimate(draws, lambda own: _perplexity(own, 1), found),
        rise=estimate(draws, lambda own: _perplexity(own, 1) / _perplexity(own, 0) - 1, found),
        kl=mean_of(lambda window: window.differences.kl),
        kl_p99=estimate(
            draws, lambda own: float(np.quantile(np.concatenate([w.differences.kl for w in own]), 0.99)), found
        ),
        same_top=mean_of(lambda window: window.differences.same_top),
        same_greedy=mean_of(lambda window: window.same_greedy),
        pressure=engine.pressure if isinstance(engine, EngineUnderPressure) else None,
    )


def _perplexity(windows: Sequence[_Window], run: int) -> float:
    return math.exp(-float(np.mean([np.mean(w.differences.logprobs[run], dtype=np.float64) for w in windows])))


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value

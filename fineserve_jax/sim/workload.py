"""Workloads: who asks what, and when. Drawn here or read by `traces`; the same seed gives the same bytes."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fineserve_jax.errors import ConfigError
from fineserve_jax.request.request_options import RequestOptions

# Lengths of chats, log-normal: medians near those of the ShareGPT conversations that serving papers sample
# (arXiv 2309.06180 gives means of 161 and 338 tokens).
CHAT_LENGTHS = ((math.log(110.0), 0.9), (math.log(230.0), 0.9))
NO_OPTIONS = RequestOptions()


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that will come.

    Attributes:
        arrival_s: seconds from the start.
        prompt_tokens, output_tokens: lengths; nobody but the simulator knows the second before it is reached.
        options: model, KV precision, tenant, priority and targets. Many arrivals share one object.
        prefix, prefix_tokens: requests with the same `prefix` have their first `prefix_tokens` tokens in common.

    Raises:
        ConfigError: a `min_kv_precision`, which is not simulated.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    options: RequestOptions = NO_OPTIONS
    prefix: int = 0
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.options.min_kv_precision is not None:
            raise ConfigError(
                f"min_kv_precision={self.options.min_kv_precision!r}: narrowing is not simulated; leave it out"
            )

    @property
    def model(self) -> str:
        """Name of the model that serves it; "" for one that has not been dealt out yet."""
        return self.options.model or ""

    @property
    def kv_precision(self) -> str:
        """Its KV format; "" for one that has not been dealt out yet."""
        return self.options.kv_precision or ""


@dataclass(frozen=True, slots=True)
class Kind:
    """A share of the requests, and the options that they have in common."""

    share: float
    options: RequestOptions


def updated(options: RequestOptions, **changes: Any) -> RequestOptions:
    """The options with some of them changed, checked anew; raises RequestError for a bad one."""
    return RequestOptions(**(options.model_dump(exclude_unset=True) | changes))


def draw(rate: float, seconds: float, seed: int, *, burstiness: float = 1.0) -> list[Arrival]:
    """Arrivals at random: their gaps are Gamma distributed, their lengths those of chats (`CHAT_LENGTHS`).

    Args:
        rate: mean requests a second.
        seconds: how long they keep coming.
        seed: the same seed draws the same arrivals.
        burstiness: coefficient of variation of the gaps; 1 is Poisson, more is burstier.

    Raises:
        ConfigError: a rate, duration or burstiness that is not positive.
    """
    for name, value in (("rate", rate), ("seconds", seconds), ("burstiness", burstiness)):
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value!r} of a drawn workload; give a positive number")
    rng = np.random.default_rng([seed, 1])
    shape = burstiness**-2
    expected = int(rate * seconds + 10 * burstiness * math.sqrt(rate * seconds) + 10)
    times: list[float] = []
    while not times or times[-1] < seconds:
        gaps = rng.gamma(shape, 1 / (shape * rate), expected)
        times += (np.cumsum(gaps) + (times[-1] if times else 0.0)).tolist()
    times = [time for time in times if time < seconds]
    pairs = _lengths(np.random.default_rng([seed, 2]), len(times))
    return [Arrival(time, *pair) for time, pair in zip(times, pairs, strict=True)]


def _lengths(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    prompts, outputs = (rng.lognormal(*of, size=count) for of in CHAT_LENGTHS)
    clipped = (np.clip(np.rint(values), 4, 2048).astype(int).tolist() for values in (prompts, outputs))
    return list(zip(*clipped, strict=True))


def assign(arrivals: Iterable[Arrival], kinds: Sequence[Kind], seed: int) -> list[Arrival]:
    """Deal arrivals out to kinds at random, in proportion to their shares; they get the options of their kinds.

    Raises:
        ConfigError: no kinds, or a share that is not positive.
    """
    listed = list(arrivals)
    dealt = zip(listed, deal(len(listed), kinds, seed), strict=True)
    return [dataclasses.replace(arrival, options=kind.options) for arrival, kind in dealt]


def deal(count: int, kinds: Sequence[Kind], seed: int) -> list[Kind]:
    """The kinds of `count` requests, at random in proportion to their shares.

    Raises:
        ConfigError: no kinds, or a share that is not positive.
    """
    if not kinds or not all(kind.share > 0 and math.isfinite(kind.share) for kind in kinds):
        raise ConfigError(f"a mix of {[kind.share for kind in kinds]}: give at least one kind, each a positive share")
    shares = np.array([kind.share for kind in kinds])
    picks = np.random.default_rng([seed, 3]).choice(len(kinds), size=count, p=shares / shares.sum())
    return [kinds[pick] for pick in picks.tolist()]


def scale_rate(arrivals: Iterable[Arrival], factor: float) -> list[Arrival]:
    """The same requests, `factor` times as fast; raises ConfigError for a factor that is not positive."""
    if not (factor > 0 and math.isfinite(factor)):
        raise ConfigError(f"rate scale {factor!r}; give a positive number")
    return [dataclasses.replace(arrival, arrival_s=arrival.arrival_s / factor) for arrival in arrivals]

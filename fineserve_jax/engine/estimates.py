"""Figures with 95 % intervals: percentile bootstraps (Efron, 1979) over what was drawn independently."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95

T = TypeVar("T")


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def draws_of(count: int, seed: int = 0) -> np.ndarray:
    """Samples of so many things, drawn with replacement, as often as there are: i64[RESAMPLES, count]."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def estimate(draws: np.ndarray, statistic: Callable[[Sequence[T]], float], samples: Sequence[T]) -> Estimate:
    """A statistic of samples, and its interval over `draws` of them. Draw once for figures that are compared."""
    values = [statistic([samples[i] for i in draw]) for draw in draws]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(statistic(samples), float(low), float(high))

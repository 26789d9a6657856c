"""Level 2's model of the device: how long a step takes, learnt while serving.

    seconds = c0 fixed + c1 tokens + c2 max(0, tokens - knee) + c3 chunk_pairs + c4 kv_bytes + c5 kv_tokens,  all c >= 0

`fixed` is the step's overhead and the reading of the weights. Up to the `knee` (the ridge point of the
roofline, where the matrix products take as long as reading the weights) further tokens are nearly free;
beyond it each costs its operations. Attention adds the operations of chunks and the bytes of cached K and V, and
for each token in these what a narrow format may cost besides where it is widened slowly.
It starts as the device's roofline (Williams et al., CACM 2009: time is the greater of operations/peak and
bytes/bandwidth), taken for the matrix products and for attention apart: c = (1, 0, 1, 1, 1, 0) in units of the
roofline's own seconds, a cached token's being those of its pair with one query.

Relative errors weigh long steps by little, so that the fit alone comes out too short in sum wherever times scatter.
Therefore it is multiplied by the `bias` that makes its sum right.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fineserve_jax.errors import ConfigError
from fineserve_jax.scheduler.costs import FormatCost, ModelCost, StepCost
from fineserve_jax.scheduler.devices import DeviceRoofline

START = (1.0, 0.0, 1.0, 1.0, 1.0, 0.0)
TERMS = len(START)
NNLS_ITERATIONS = 100
FORGETTING = 0.995
"""Weight of an observation falls by this factor with each later one: a memory of some 200 steps."""

STICKINESS = 1e-3
"""Weight of the present coefficients against the observations; what no step shows (say, prefill while all
decode) stays as it was."""

LONGEST_COUNTED = 1.5
"""Times its prediction that a step adds at most to the sums of `bias`: one that stood still moves it by little."""

SHORTEST_S = 1e-6
"""No step is predicted to be shorter, though all that a fit has left of what one costs may be a part that it lacks."""

ERROR_MEMORY = 0.05
"""Weight of the newest relative error in the running one."""


class StepProfile:
    """Predicts a model's step time and refines the prediction from steps that were timed.

    Args:
        model: operations and bytes of the model.
        roofline: the device's peaks, where it starts from.

    Attributes:
        coefficients: f64[6], the c of the formula above, in units of the roofline's seconds.
        error: running mean of |predicted - observed| / observed, each capped at 1; None before the first
            observation.
        num_observed: steps observed.
    """

    def __init__(self, model: ModelCost, roofline: DeviceRoofline) -> None:
        token_s = model.flops_per_token / roofline.flops
        weights_s = model.weight_bytes / roofline.bandwidth
        self.model, self.roofline = model, roofline
        self.knee_tokens = weights_s / token_s
        self.coefficients = np.array(START)
        self.error: float | None = None
        self.num_observed = 0
        pair_s, byte_s = model.flops_per_pair / roofline.flops, 1.0 / roofline.bandwidth
        self._fixed_s = weights_s + roofline.overhead_s
        self._token_s, self._pair_s, self._byte_s = token_s, pair_s, byte_s
        self._gram = np.zeros((TERMS, TERMS))
        self._moment = np.zeros(TERMS)
        self._sums = np.zeros(2)  # of seconds observed and predicted
        self._publish()

    @property
    def bias(self) -> float:
        """Seconds observed over seconds that the coefficients alone would have predicted, in sum; 1 before any."""
        observed, predicted = self._sums.tolist()
        return observed / predicted if predicted > 0.0 else 1.0

    def predict(self, cost: StepCost) -> float:
        """Seconds that a step of that cost takes, more than 0; grows with each part of the cost."""
        c0, c1, c2, c3, c4, c5 = self._seconds
        beyond = max(0.0, cost.tokens - self.knee_tokens)
        attention = c3 * cost.chunk_pairs + c4 * cost.kv_bytes + c5 * cost.kv_tokens
        return max(SHORTEST_S, c0 + c1 * cost.tokens + c2 * beyond + attention)

    def observe(self, cost: StepCost, seconds: float) -> None:
        """Learn from a step; not to be called for one that compiled.

        Least squares of relative errors with exponential forgetting, coefficients kept at or above zero.
        Taking errors relative to the time observed also makes an outlier harmless: a step k times too slow
        weighs 1/k.
        """
        if not seconds > 0.0:
            raise ValueError(f"a step of {seconds!r} seconds: the time must be positive")
        error = min(1.0, abs(self.predict(cost) - seconds) / seconds)
        self._remember(cost, seconds, FORGETTING)
        self._refit()
        fitted = float(self._features(cost) @ self.coefficients)
        self._sums = FORGETTING * self._sums + (min(seconds, LONGEST_COUNTED * fitted), fitted)
        self._publish()
        self.error = error if self.error is None else self.error + ERROR_MEMORY * (error - self.error)
        self.num_observed += 1

    def fit(self, steps: Iterable[tuple[StepCost, float]]) -> "StepProfile":
        """Learn from many steps at once, none of them older than another; itself."""
        for cost, seconds in steps:
            self._remember(cost, seconds, 1.0)
            self.num_observed += 1
        self._refit()
        self._publish()
        return self

    def _remember(self, cost: StepCost, seconds: float, keep: float) -> None:
        features = self._features(cost) / seconds
        self._gram = keep * self._gram + np.outer(features, features)
        self._moment = keep * self._moment + features

    def _refit(self) -> None:
        self.coefficients = _nonnegative_least_squares(
            self._gram + STICKINESS * np.eye(TERMS), self._moment + STICKINESS * self.coefficients
        )

    # -- kept in a file ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, inverse of `from_dict`."""
        return {
            "model": asdict(self.model) | {"formats": {n: asdict(f) for n, f in self.model.formats.items()}},
            "roofline": asdict(self.roofline),
            "coefficients": self.coefficients.tolist(),
            "gram": self._gram.tolist(),
            "moment": self._moment.tolist(),
            "sums": self._sums.tolist(),
            "error": self.error,
            "num_observed": self.num_observed,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StepProfile":
        """A profile as `to_dict` wrote it. Raises KeyError, TypeError or ValueError for anything else."""
        model = dict(values["model"])
        formats = {name: FormatCost(**cost) for name, cost in model.pop("formats").items()}
        profile = cls(ModelCost(**model, formats=formats), DeviceRoofline(**values["roofline"]))
        profile.coefficients = np.array(values["coefficients"], float).reshape(TERMS)
        profile._gram = np.array(values["gram"], float).reshape(TERMS, TERMS)
        profile._moment = np.array(values["moment"], float).reshape(TERMS)
        profile._sums = np.array(values["sums"], float).reshape(2)
        profile.error, profile.num_observed = values["error"], values["num_observed"]
        profile._publish()
        return profile

    def _features(self, cost: StepCost) -> np.ndarray:
        """The terms in the roofline's seconds, so that coefficients are about 1."""
        beyond = max(0.0, cost.tokens - self.knee_tokens)
        return np.array(
            [
                self._fixed_s,
                self._token_s * cost.tokens,
                self._token_s * beyond,
                self._pair_s * cost.chunk_pairs,
                self._byte_s * cost.kv_bytes,
                self._pair_s * cost.kv_tokens,
            ]
        )

    def _publish(self) -> None:
        """Coefficients as plain floats in seconds: `predict` is called many times a step."""
        units = (self._fixed_s, self._token_s, self._token_s, self._pair_s, self._byte_s, self._pair_s)
        bias = self.bias
        self._seconds = tuple(bias * c * unit for c, unit in zip(self.coefficients.tolist(), units, strict=True))


def save_profiles(path: str | Path, profiles: Mapping[str, StepProfile]) -> None:
    """Write the profiles of models, by name, to a JSON file, in one piece. Raises OSError if that cannot be done."""
    text = json.dumps({name: profile.to_dict() for name, profile in profiles.items()}, indent=1) + "\n"
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def load_profiles(path: str | Path) -> dict[str, StepProfile]:
    """The profiles in a file that `save_profiles` wrote; raises ConfigError for anything else."""
    try:
        listed = json.loads(Path(path).read_text())
        return {name: StepProfile.from_dict(values) for name, values in listed.items()}
    except OSError as error:
        raise ConfigError(f"cannot read the step profile {path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no step profile ({error!r}); write one with save_profiles") from None


def _nonnegative_least_squares(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises x'Gx - 2m'x for a positive definite G = LL': |L'x - m/L|^2 less a constant."""
    from scipy.optimize import nnls  # here, since importing it takes longer than `simulate --help` may

    lower = np.linalg.cholesky(gram)
    x, _ = nnls(lower.T, np.linalg.solve(lower, moment), maxiter=NNLS_ITERATIONS)
    return x

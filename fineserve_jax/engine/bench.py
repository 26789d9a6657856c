"""How fast an engine is: prompts that are served all at once, and when each of their tokens came."""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fineserve_jax.engine.engine import Engine
from fineserve_jax.errors import EngineError
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Served:
    """Prompts that were served at once, all of them added before the first step.

    Attributes:
        prompt_tokens: of all prompts.
        first_s: f64[prompts], seconds from the start to each prompt's first token (TTFT).
        gaps_s: f64[tokens - prompts], seconds between neighbouring tokens of a prompt (ITL).
        total_s: f64[prompts], seconds from the start to each prompt's last token.
        decode_tokens, decode_s: tokens, and seconds, from when every prompt has its first token until the first one
            ends, so that all of them decode in each of these steps; not positive if one ends before.
    """

    prompt_tokens: int
    first_s: np.ndarray
    gaps_s: np.ndarray
    total_s: np.ndarray
    decode_tokens: int
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens over the time until every prompt has its first token."""
        return self.prompt_tokens / float(self.first_s.max())

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens over time while all prompts decode; None if they never do."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else None

    @property
    def output_tokens_per_s(self) -> float:
        """All tokens over all time."""
        return (self.first_s.size + self.gaps_s.size) / float(self.total_s.max())


def serve_at_once(
    engine: Engine, prompts: Sequence[Sequence[int]], kv_precisions: Sequence[str], output_tokens: int
) -> Served:
    """Serves prompts with `output_tokens` tokens each, greedily, whatever these are.

    Args:
        engine: with nothing else to do meanwhile, and without a prefix cache, so that it computes all of them.
        kv_precisions: KV formats, dealt out to the prompts in turn.
        output_tokens: at least 2.

    Raises:
        RequestError: prompts that the engine cannot serve.
        EngineError: a prompt ended early, since the model computed NaN or infinity.
    """
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    options = [RequestOptions(kv_precision=name) for name in kv_precisions]
    requests = [engine.add_request(prompt, sampling, own) for prompt, own in zip(prompts, itertools.cycle(options))]
    start, came = time.perf_counter(), {request: list[float]() for request in requests}
    while engine.has_unfinished:
        advanced = engine.step()
        now = time.perf_counter() - start
        for request in advanced:
            came[request] += [now] * (request.num_output_tokens - len(came[request]))
    for request in requests:
        engine.release(request)
        if request.error is not None:
            raise EngineError(f"there is nothing to measure: {request.error}")
    return served_at(sum(map(len, prompts)), list(came.values()))


def served_at(prompt_tokens: int, times: Sequence[Sequence[float]]) -> Served:
    """What it came to.

    Args:
        prompt_tokens: of all prompts.
        times: of each prompt the seconds from the start to each of its tokens, as many for all prompts.
    """
    table = np.array(times)  # [prompts, tokens]
    all_begun, first_ended = table[:, 0].max(), table[:, -1].min()
    return Served(
        prompt_tokens=prompt_tokens,
        first_s=table[:, 0],
        gaps_s=np.diff(table, axis=1).ravel(),
        total_s=table[:, -1],
        decode_tokens=int(((table > all_begun) & (table <= first_ended)).sum()),
        decode_s=float(first_ended - all_begun),
    )


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens; no two begin alike but by chance."""
    prompts: list[list[int]] = np.random.default_rng(seed).integers(0, vocab_size, (count, length)).tolist()
    return prompts


def percentiles(seconds: Iterable[np.ndarray]) -> dict[str, float]:
    """Percentiles of all values of some arrays, by name: "p50", "p90", "p99"."""
    values = np.concatenate(list(seconds))
    return {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}

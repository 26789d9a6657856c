"""Requests to sample for, and an oracle of what `top_k`, `top_p` and `min_p` keep."""

import functools

import jax
import numpy as np

from fineserve_jax.request.request import Request, RequestTimes
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.sampler import Sampled, sample
from fineserve_jax.runner.sampling_inputs import build_sampling

MAX_SEQ_LEN = 32

_sample = jax.jit(sample)


def make_request(
    seed: int = 0,
    prompt=(0,),
    output=(),
    stop_ids: frozenset[int] = frozenset(),
    sampling: SamplingParams | None = None,
    **params,
) -> Request:
    """With `sampling`, or with `SamplingParams(**params)`."""
    return Request(
        request_id=f"r{seed}",
        model="m",
        kv_precision="bf16",
        sampling=sampling or SamplingParams(**params),
        token_ids=[*prompt, *output],
        num_prompt_tokens=len(prompt),
        max_total_tokens=MAX_SEQ_LEN,
        sequence=seed,
        times=RequestTimes(arrival_s=0.0),
        seed=seed,
        stop_ids=stop_ids,
    )


def draw(logits, requests: list[Request], rows: int | None = None, allowed: np.ndarray | None = None) -> Sampled:
    """Samples for requests, `logits` f32[vocab] for all or f32[requests, vocab]; padded to `rows`.

    allowed: u32[rows, words], see `sample`.
    """
    rows = len(requests) if rows is None else rows
    logits = np.asarray(logits, np.float32)
    padded = np.full((rows, logits.shape[-1]), 3.0, np.float32)
    padded[: len(requests)] = logits
    sampled = _sample(padded, build_sampling(requests, rows, MAX_SEQ_LEN), allowed)
    return jax.tree.map(lambda part: np.asarray(part)[: len(requests)], sampled)


def frequencies(logits, num_draws: int, **params) -> np.ndarray:
    """How often each token is drawn by that many requests that differ in their seeds."""
    sampling = SamplingParams(**params)
    tokens = draw(logits, [make_request(seed, sampling=sampling) for seed in range(num_draws)]).tokens
    return np.bincount(tokens, minlength=np.shape(logits)[-1])


def softmax(logits) -> np.ndarray:
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def kept_tokens(logits, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The tokens that may be drawn, by sorting: `top_k`, then `top_p` of what is left, then `min_p`."""
    probabilities = softmax(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-probabilities)
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        mass = np.cumsum(probabilities[order])
        order = order[: np.searchsorted(mass, top_p * mass[-1]) + 1]
    return {int(token) for token in order if probabilities[token] >= min_p * probabilities.max()}


def decided_by_rounding(logits, temperature: float, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether a boundary of `top_p` or `min_p` lies so near to a token that float32 may see it otherwise."""
    probabilities = np.sort(softmax(np.asarray(logits, np.float64) / temperature))[::-1]
    mass = np.cumsum(probabilities[: top_k or None])
    near_p = np.abs(mass / mass[-1] - top_p).min() if top_p < 1 else 1.0
    near_min = np.abs(probabilities / probabilities[0] - min_p).min() if 0 < min_p < 1 else 1.0
    return bool(min(near_p, near_min) < 1e-5)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


normal_logits = functools.lru_cache(
    lambda seed, shape, scale=1.0: scale * np.random.default_rng(seed).standard_normal(shape)
)

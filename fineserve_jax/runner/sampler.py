"""Choosing the next tokens, inside the jitted step.

A row's choice depends on its own logits, parameters, seed and position alone, so a request draws the same tokens
whatever shares its batch. What no row of a batch asks for is skipped at run time, not compiled away: one program serves
every mix of parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float32, Int32, UInt32

from fineserve_jax.request.request import Request
from fineserve_jax.request.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS, MAX_TOP_LOGPROBS
from fineserve_jax.runner.token_masks import WORD_BITS

Array = Any  # numpy on the host, jax.Array in the step
Logits = Float32[jax.Array, "rows vocab"]  # or what they have become: shaped logits, probabilities
Tokens = Int32[jax.Array, " rows"]
Ids = Int32[jax.Array, "rows ids"]
Finite = Bool[jax.Array, " rows"]
Masks = UInt32[jax.Array, "rows words"]
MAX_STOP_IDS = 64  # tokens that `min_tokens` can hold back, besides those of `logit_bias`


class SamplingInputs(NamedTuple):
    """Per sampled row (S of them; padding rows are greedy).

    Attributes:
        temperature, top_p, min_p: f32[S].
        top_k: i32[S], 0 for all.
        repetition, presence, frequency: f32[S], penalties.
        seed: u32[S].
        position: i32[S], of the token to be sampled.
        bias_ids, bias: i32 and f32[S, B]; unused entries add 0 to token 0.
        history: i32[S, max_seq_len], prompt and output tokens; -1 behind them.
        num_prompt_tokens: i32[S].
        logprob_ids: i32[S, MAX_LOGPROB_TOKEN_IDS], tokens to be told of; unused entries are 0.
        any_*: bool[], whether any row needs that part at all.
    """

    temperature: Array
    top_p: Array
    min_p: Array
    top_k: Array
    repetition: Array
    presence: Array
    frequency: Array
    seed: Array
    position: Array
    bias_ids: Array
    bias: Array
    history: Array
    num_prompt_tokens: Array
    logprob_ids: Array
    any_penalty: Array
    any_bias: Array
    any_filter: Array
    any_random: Array
    any_logprobs: Array


class Sampled(NamedTuple):
    """What a step samples.

    Attributes:
        tokens: i32[S].
        finite: bool[S], whether the logits that the token was chosen by are finite, but for minus infinities of tokens
            that are excluded; where not, the rest means nothing.
        logprobs: f32[S], the model's log-probability of each token; 0 where none were asked for.
        top_ids, top_logprobs: i32 and f32[S, MAX_TOP_LOGPROBS], the most likely tokens, likeliest first.
        asked_logprobs: f32[S, MAX_LOGPROB_TOKEN_IDS], of `logprob_ids`.
    """

    tokens: Array
    finite: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array
    asked_logprobs: Array


def build_sampling(
    requests: Sequence[Request], rows: int, max_seq_len: int, drafts: Sequence[tuple[int, ...]] | None = None
) -> SamplingInputs:
    """The parameters of the requests to be sampled, in their order, padded to `rows`.

    Args:
        drafts: of each, the tokens that are taken to follow those it has; None: none.
    """
    params = [request.sampling for request in requests]
    drafts = drafts or [()] * len(requests)
    num_tokens = [request.num_tokens + len(own) for request, own in zip(requests, drafts, strict=True)]

    def column(name: str, dtype: type, padding: float = 0) -> np.ndarray:
        values: np.ndarray = np.full(rows, padding, dtype)
        values[: len(params)] = [getattr(p, name) for p in params]
        return values

    bias_ids, bias, any_bias = _bias(requests, num_tokens, rows)
    any_penalty = any(p.uses_penalties for p in params)
    history = np.full((rows, max_seq_len), -1, np.int32)
    if any_penalty:
        for row, (request, own) in enumerate(zip(requests, drafts, strict=True)):
            history[row, : num_tokens[row]] = [*request.token_ids, *own]
    logprob_ids = np.zeros((rows, MAX_LOGPROB_TOKEN_IDS), np.int32)
    for row, p in enumerate(params):
        logprob_ids[row, : len(p.logprob_token_ids)] = p.logprob_token_ids
    return SamplingInputs(
        temperature=column("temperature", np.float32),
        top_p=column("top_p", np.float32, 1.0),
        min_p=column("min_p", np.float32),
        top_k=column("top_k", np.int32),
        repetition=column("repetition_penalty", np.float32, 1.0),
        presence=column("presence_penalty", np.float32),
        frequency=column("frequency_penalty", np.float32),
        seed=_padded([request.seed for request in requests], rows, np.uint32),
        position=_padded(num_tokens, rows, np.int32),
        bias_ids=bias_ids,
        bias=bias,
        history=history,
        num_prompt_tokens=_padded([request.num_prompt_tokens for request in requests], rows, np.int32),
        logprob_ids=logprob_ids,
        any_penalty=np.bool_(any_penalty),
        any_bias=np.bool_(any_bias),
        any_filter=np.bool_(any(p.temperature and (p.top_k or p.top_p < 1 or p.min_p) for p in params)),
        any_random=np.bool_(any(p.temperature for p in params)),
        any_logprobs=np.bool_(any(p.gives_logprobs for p in params)),
    )


def _padded(values: Sequence[int], rows: int, dtype: type) -> np.ndarray:
    padded: np.ndarray = np.zeros(rows, dtype)
    padded[: len(values)] = values
    return padded


def _bias(requests: Sequence[Request], num_tokens: Sequence[int], rows: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Logit biases, and minus infinity for the stop tokens of requests that are still under `min_tokens`."""
    width = MAX_LOGIT_BIAS + MAX_STOP_IDS
    ids, values = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    any_bias = False
    for row, request in enumerate(requests):
        entries = list(request.sampling.logit_bias.items())
        num_output_tokens = num_tokens[row] - request.num_prompt_tokens
        held_back = request.matcher is None and num_output_tokens < request.sampling.min_tokens
        if held_back:  # else `token_masks` see to it, which know what else may follow
            entries += [(token, -np.inf) for token in sorted(request.stop_ids)]
        if entries:
            ids[row, : len(entries)], values[row, : len(entries)] = zip(*entries, strict=True)
            any_bias = True
    return ids, values, any_bias


def sample(logits: Logits, inputs: SamplingInputs, allowed: Masks | None = None) -> Sampled:
    """Chooses a token for each row of f32[S, vocab] logits.

    Args:
        allowed: u32[S, words], the tokens that a row may sample, see `token_masks`; None: any.
    """

    def candidates() -> Logits:
        return logits if allowed is None else _exclude(logits, allowed)

    # One branch for the common case: each one taken apart would copy the logits.
    return lax.cond(
        inputs.any_penalty | inputs.any_bias | inputs.any_random | inputs.any_logprobs,
        lambda: _sample_as_asked(logits, candidates(), inputs),
        lambda: _without_logprobs(logits, *_greedy(candidates())),
    )


def _exclude(logits: Logits, allowed: Masks) -> Logits:
    """Minus infinity for tokens whose bit is not set. It is added, so that what is not finite stays so."""
    bits = (allowed[:, :, None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)) & 1
    bits = bits.reshape(allowed.shape[0], -1)[:, : logits.shape[-1]]
    return logits + jnp.where(bits == 1, 0.0, -jnp.inf)


def _greedy(logits: Logits) -> tuple[Tokens, Finite]:
    """The likeliest tokens, and whether each row's logits are finite, see `Sampled`.

    A row's largest logit tells, so that nothing is read again: NaN is the largest where there is any, infinity exceeds
    all others, and minus infinity is the largest only where there is nothing else.
    """
    largest = jnp.max(logits, axis=-1)
    return _first(logits, largest), jnp.isfinite(largest)


def _first(x: Logits, largest: Float32[jax.Array, " rows"]) -> Tokens:
    """The first token of each row at which `x` is that large; any where that is NaN.

    XLA's `argmax` takes one number at a time on CPUs, fifteen times as long as these two reductions.
    """
    vocab = x.shape[-1]
    places = jnp.where(x == largest[:, None], jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return jnp.min(places, axis=-1)


def _sample_as_asked(logits: Logits, candidates: Logits, inputs: SamplingInputs) -> Sampled:
    shaped = _when(inputs.any_penalty, lambda x: _penalise(x, inputs), candidates)
    shaped = _when(inputs.any_bias, lambda x: _add_bias(x, inputs), shaped)
    greedy, finite = _greedy(shaped)  # what is not finite of the logits has stayed so
    tokens = lax.cond(inputs.any_random, lambda: _draw(shaped, greedy, inputs), lambda: greedy)
    return lax.cond(
        inputs.any_logprobs,
        lambda: _with_logprobs(logits, tokens, finite, inputs.logprob_ids),
        lambda: _without_logprobs(logits, tokens, finite),
    )


def _when(condition: Bool[jax.Array, ""], change: Callable[[Logits], Logits], x: Logits) -> Logits:
    return lax.cond(condition, change, lambda same: same, x)


def _penalise(logits: Logits, inputs: SamplingInputs) -> Logits:
    rows, length = inputs.history.shape
    row = jnp.arange(rows)[:, None]
    # -1 would index from the end; past the end it is dropped.
    token = jnp.where(inputs.history < 0, logits.shape[-1], inputs.history)
    seen = jnp.zeros(logits.shape, bool).at[row, token].set(True, mode="drop")
    generated = jnp.arange(length) >= inputs.num_prompt_tokens[:, None]
    counts = jnp.zeros_like(logits).at[row, token].add(generated.astype(jnp.float32), mode="drop")
    repetition = inputs.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - inputs.frequency[:, None] * counts - inputs.presence[:, None] * (counts > 0)


def _add_bias(logits: Logits, inputs: SamplingInputs) -> Logits:
    return logits.at[jnp.arange(logits.shape[0])[:, None], inputs.bias_ids].add(inputs.bias)


def _draw(logits: Logits, greedy: Tokens, inputs: SamplingInputs) -> Tokens:
    """A token from each row's distribution, by the Gumbel-max trick; `greedy` where the temperature is 0."""
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)
    probabilities = jax.nn.softmax(logits / temperature[:, None], axis=-1)
    probabilities = _when(inputs.any_filter, lambda p: _filter(p, inputs), probabilities)

    def noise(seed: UInt32[jax.Array, ""], position: Int32[jax.Array, ""]) -> Float32[jax.Array, " vocab"]:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), logits.shape[1:])

    noisy = jnp.log(probabilities) + jax.vmap(noise)(inputs.seed, inputs.position)
    drawn = _first(noisy, jnp.max(noisy, axis=-1))
    return jnp.where(inputs.temperature > 0, drawn, greedy)


def _filter(probabilities: Logits, inputs: SamplingInputs) -> Logits:
    """Zeroes what `top_k`, `top_p` and `min_p` exclude, in this order. Rows need not sum to 1 afterwards."""
    vocab = probabilities.shape[-1]
    k = jnp.where(inputs.top_k > 0, inputs.top_k, vocab).astype(jnp.float32)
    probabilities = _keep_until(probabilities, jnp.ones_like(probabilities), k)
    # Rounding must not make the sum miss a top_p of 1: that keeps everything.
    mass = jnp.where(inputs.top_p < 1, inputs.top_p * probabilities.sum(axis=-1), jnp.inf)
    probabilities = _keep_until(probabilities, probabilities, mass)
    floor = inputs.min_p * jnp.max(probabilities, axis=-1)
    return jnp.where(probabilities >= floor[:, None], probabilities, 0.0)


def _keep_until(probabilities: Logits, weights: Logits, target: Float32[jax.Array, " rows"]) -> Logits:
    """Keeps each row's likeliest tokens, as few as reach `target` f32[S] in `weights`; ties with the last are kept.

    Finds the threshold bit by bit: non-negative floats sort as their bits do, so 31 passes replace a sort of the
    vocabulary.
    """
    bits = lax.bitcast_convert_type(probabilities, jnp.uint32)

    def try_bit(i: Int32[jax.Array, ""], threshold: UInt32[jax.Array, " rows"]) -> UInt32[jax.Array, " rows"]:
        higher = threshold | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(bits >= higher[:, None], weights, 0.0), axis=-1) >= target
        return jnp.where(reached, higher, threshold)

    threshold = lax.fori_loop(0, 31, try_bit, jnp.zeros(probabilities.shape[0], jnp.uint32))
    return jnp.where(bits >= threshold[:, None], probabilities, 0.0)


def _with_logprobs(logits: Logits, tokens: Tokens, finite: Finite, asked: Ids) -> Sampled:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    top_ids = likeliest(logits)
    of_top, of_asked = (jnp.take_along_axis(logprobs, ids, axis=-1) for ids in (top_ids, asked))
    return Sampled(tokens, finite, chosen, top_ids, of_top, of_asked)


def likeliest(logits: Logits) -> Ids:
    """Each row's `MAX_TOP_LOGPROBS` likeliest tokens, in the order of the logits, which may differ where
    log-probabilities round to the same."""
    return lax.top_k(logits, min(MAX_TOP_LOGPROBS, logits.shape[-1]))[1].astype(jnp.int32)


def _without_logprobs(logits: Logits, tokens: Tokens, finite: Finite) -> Sampled:
    rows, width = logits.shape[0], min(MAX_TOP_LOGPROBS, logits.shape[-1])
    none, of_asked = jnp.zeros((rows, width), jnp.float32), jnp.zeros((rows, MAX_LOGPROB_TOKEN_IDS), jnp.float32)
    return Sampled(tokens, finite, none[:, 0], jnp.zeros((rows, width), jnp.int32), none, of_asked)

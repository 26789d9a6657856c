"""Choosing the next tokens, inside the jitted step.

A row's choice depends on its own logits, parameters, seed and position alone, so a request draws the same tokens
whatever shares its batch. What no row of a batch asks for is skipped at run time, not compiled away: one program serves
every mix of parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float32, Int32, UInt32

from fineserve_jax.request.sampling_params import MAX_LOGPROB_TOKEN_IDS, MAX_TOP_LOGPROBS
from fineserve_jax.runner.sampling_inputs import SamplingInputs
from fineserve_jax.runner.token_masks import WORD_BITS

Array = Any  # numpy on the host, jax.Array in the step
Logits = Float32[jax.Array, "rows vocab"]  # or what they have become: shaped logits, probabilities
Tokens = Int32[jax.Array, " rows"]
Ids = Int32[jax.Array, "rows ids"]
Row = Float32[jax.Array, " rows"]
Finite = Bool[jax.Array, " rows"]
Masks = UInt32[jax.Array, "rows words"]
BLOCK = 128
"""Tokens that are looked at together when one is drawn."""
CANDIDATES = 256
"""Likeliest tokens of a row that are sorted for `top_k` and `top_p`."""


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


def sample(
    logits: Logits, inputs: SamplingInputs, allowed: Masks | None = None, processed: Logits | None = None
) -> Sampled:
    """Chooses a token for each row of f32[S, vocab] logits.

    Args:
        allowed: u32[S, words], the tokens that a row may sample, see `token_masks`; None: any.
        processed: what to choose by in the place of the logits, of which log-probabilities are told; None: the same.
    """

    def candidates() -> Logits:
        chosen_by = logits if processed is None else processed
        return chosen_by if allowed is None else _exclude(chosen_by, allowed)

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
    """A token from each row's distribution: a block of the vocabulary by what its tokens weigh together, then a token
    of the block, each by a random number of its own; `greedy` where the temperature is 0."""
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)[:, None]
    peak = jnp.take_along_axis(logits, greedy[:, None], axis=-1)

    def weigh(logits: jax.Array) -> jax.Array:
        """Probabilities over that of the likeliest token, f32[S, tokens]."""
        return jnp.exp((logits - peak) / temperature)

    def least() -> Row:
        by_min_p = peak + temperature * jnp.log(inputs.min_p)[:, None]
        return jnp.maximum(_least_kept(logits, weigh, inputs), by_min_p[:, 0])

    floor = lax.cond(inputs.any_filter, least, lambda: jnp.full(len(logits), -jnp.inf))[:, None]

    def kept(logits: jax.Array) -> jax.Array:
        return jnp.where(logits >= floor, weigh(logits), 0.0)

    chances = jax.vmap(_chances)(inputs.seed, inputs.position)
    blocks = _in_blocks(logits)
    sums = kept(blocks.reshape(len(logits), -1)).reshape(blocks.shape).sum(axis=-1)
    block = _reach(sums, chances[:, 0])
    drawn = block * blocks.shape[-1] + _reach(kept(_take_block(blocks, block)), chances[:, 1])
    return jnp.where(inputs.temperature > 0, drawn.astype(jnp.int32), greedy)


def _chances(seed: UInt32[jax.Array, ""], position: Int32[jax.Array, ""]) -> Float32[jax.Array, "2"]:
    """Two random numbers above 0, up to 1."""
    return 1.0 - jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position), (2,))


def _reach(weights: Float32[jax.Array, "rows items"], share: Float32[jax.Array, " rows"]) -> Tokens:
    """Of each row the first item with which a share, above 0, of what all weigh is reached: it weighs something."""
    reached = jnp.cumsum(weights, axis=-1)
    return jnp.argmax(reached >= (share * reached[:, -1])[:, None], axis=-1).astype(jnp.int32)


def _in_blocks(logits: Logits) -> Float32[jax.Array, "rows blocks size"]:
    """The vocabulary in blocks of `BLOCK` tokens, the last one filled up with minus infinity."""
    size = min(BLOCK, logits.shape[-1])
    padding = -logits.shape[-1] % size
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return logits.reshape(len(logits), -1, size)


def _take_block(blocks: Float32[jax.Array, "rows blocks size"], block: Tokens) -> Float32[jax.Array, "rows size"]:
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _least_kept(logits: Logits, weigh: Callable[[jax.Array], jax.Array], inputs: SamplingInputs) -> Row:
    """The least logit that `top_p` keeps of what `top_k` keeps; minus infinity where they keep all.

    The likeliest tokens tell, and only for rows of which more are kept is the whole vocabulary searched.
    """
    vocab = logits.shape[-1]
    likeliest_first = lax.top_k(logits, min(CANDIDATES, vocab))[0]
    num_known = likeliest_first.shape[-1]
    has_all, has_k, has_p = num_known == vocab, (inputs.top_k > 0) & (inputs.top_k < vocab), inputs.top_p < 1

    def at(places: Tokens) -> Row:
        return jnp.take_along_axis(likeliest_first, places[:, None], axis=-1)[:, 0]

    by_k = jnp.where(has_k, at(jnp.clip(inputs.top_k, 1, num_known) - 1), -jnp.inf)
    # With ties of the last one among them, if there are such behind them is not known.
    knows_k = ~has_k | has_all | ((inputs.top_k <= num_known) & (likeliest_first[:, -1] < by_k))
    kept = jnp.where(likeliest_first >= by_k[:, None], weigh(likeliest_first), 0.0)
    reached = jnp.cumsum(kept, axis=-1)
    total = jnp.where(has_k | has_all, reached[:, -1], weigh(logits).sum(axis=-1))
    reaches = reached >= (inputs.top_p * total)[:, None]
    by_p = jnp.where(has_p, at(jnp.argmax(reaches, axis=-1).astype(jnp.int32)), -jnp.inf)
    known = (knows_k & (~has_p | reaches[:, -1])) | (inputs.temperature <= 0)
    found = jnp.maximum(by_k, by_p)
    return lax.cond(known.all(), lambda: found, lambda: jnp.where(known, found, _search(logits, weigh, inputs)))


def _search(logits: Logits, weigh: Callable[[jax.Array], jax.Array], inputs: SamplingInputs) -> Row:
    """`_least_kept`, looking at all tokens."""
    weights, vocab = weigh(logits), logits.shape[-1]
    k = jnp.where(inputs.top_k > 0, inputs.top_k, vocab).astype(jnp.float32)
    asks_k = (inputs.top_k > 0).any()
    by_k = lax.cond(asks_k, lambda: _reaching(weights, jnp.ones_like(weights), k), lambda: jnp.zeros_like(k))
    kept = jnp.where(weights >= by_k[:, None], weights, 0.0)
    # Rounding must not make the sum miss a top_p of 1: that keeps everything.
    mass = jnp.where(inputs.top_p < 1, inputs.top_p * kept.sum(axis=-1), jnp.inf)
    threshold = jnp.maximum(by_k, _reaching(kept, kept, mass))
    return jnp.min(jnp.where(weights >= threshold[:, None], logits, jnp.inf), axis=-1)


def _reaching(weights: Logits, counted: Logits, target: Row) -> Row:
    """The largest weight of each row at which tokens of that much and more reach `target` in what is counted.

    Finds it bit by bit: non-negative floats sort as their bits do, so 31 passes replace a sort of the vocabulary.
    """
    bits = lax.bitcast_convert_type(weights, jnp.uint32)

    def try_bit(i: Int32[jax.Array, ""], threshold: UInt32[jax.Array, " rows"]) -> UInt32[jax.Array, " rows"]:
        higher = threshold | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(bits >= higher[:, None], counted, 0.0), axis=-1) >= target
        return jnp.where(reached, higher, threshold)

    threshold = lax.fori_loop(0, 31, try_bit, jnp.zeros(weights.shape[0], jnp.uint32))
    return lax.bitcast_convert_type(threshold, jnp.float32)


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

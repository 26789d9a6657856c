"""A tiny random model behind a real `ModelRunner` and a real `KVManager`, and what it ought to compute.

`World.feed` computes given tokens of requests, cut into steps in any way; `expected_logprobs` is the whole forward
pass at once, without pages, chunks or tiles. A change of the runner's signature needs an edit only here.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax.engine.page_shapes import page_classes, page_geometry
from fineserve_jax.engine.recipes import split_layers
from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.slab_size import choose_slab_units
from fineserve_jax.models import ModelConfig, build_model, random_params
from fineserve_jax.pallas_kernels.formats import FORMATS, get_format
from fineserve_jax.pallas_kernels.implementation import default_implementation
from fineserve_jax.request.request import PromptScores, Request, RequestTimes, ScheduledChunk, SchedulerOutput
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.arena import Arena
from fineserve_jax.runner.programs import compiler_options
from fineserve_jax.runner.results import SampledToken
from fineserve_jax.runner.runner import ModelRunner

MODEL = "tiny"
PAGE_SIZE = 16
VOCAB = 20  # no more than the log-probabilities that a request can ask for, so that it gets them all
NUM_UNITS = 16384
MAX_SEQ_LEN = 128
NAN_WORD = 0xFFFF  # NaN in every format
CONFIG = ModelConfig(
    family="llama",
    vocab_size=VOCAB,
    hidden_size=64,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=96,
)
GEOMETRY = page_geometry(CONFIG, PAGE_SIZE)
RECIPES = {"bent, woven": ("bent", "woven"), "woven, bent": ("woven", "bent")}
"""KV precisions that differ by layer: the format of each layer, the first one's first."""


@functools.cache
def tiny_model():
    """The module and its parameters, large enough for attention to matter."""
    return build_model(CONFIG, "fp32"), random_params(CONFIG, "fp32", seed=1, scale=0.2)


def make_kv(formats: Iterable[str] = FORMATS, recipes: Iterable[str] = ()) -> KVManager:
    by_layer = {name: RECIPES[name] for name in recipes}
    groups = split_layers(CONFIG.layer_groups, by_layer)
    classes = page_classes(MODEL, GEOMETRY, (*formats, *by_layer), groups, recipes=by_layer)
    slab_units = choose_slab_units([c.page_units for first in classes.values() for c in first.groups], NUM_UNITS)
    return KVManager(SlabAllocator(NUM_UNITS, slab_units, classes=classes.values()), classes, prefix_cache="off")


def pages_of(kv: KVManager, request: Request) -> list[int]:
    """First units of the request's pages, in order, the residual page aside."""
    return kv.first_units(request, 0, kv.holds(request).num_pages)


def make_request(name: str, kv_precision: str, token_ids: Sequence[int], **params) -> Request:
    return Request(
        request_id=name,
        model=MODEL,
        kv_precision=kv_precision,
        sampling=SamplingParams(logprobs=VOCAB, **params),
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        max_total_tokens=MAX_SEQ_LEN,
        sequence=0,
        times=RequestTimes(arrival_s=0.0),
    )


class Feed(NamedTuple):
    """Tokens to compute in one KV format, cut into chunks of these lengths: 1 decodes, more is a chunk."""

    kv_precision: str
    tokens: tuple[int, ...]
    cuts: tuple[int, ...]


class Found(NamedTuple):
    """What a feed gave.

    Attributes:
        logprobs: position -> f64[VOCAB], of the token after it; for the last position of each chunk.
        scores: position -> log-probability of the token that does come after it; for the others of each chunk.
    """

    logprobs: dict[int, np.ndarray]
    scores: dict[int, float]


class World:
    """A runner for some KV formats and recipes, its arena full of NaN; with `scores`, it scores all chunks."""

    def __init__(self, formats: Iterable[str], scores: bool = False, recipes: Sequence[str] = ()) -> None:
        formats, self.scores = tuple(formats), scores
        model, params = tiny_model()
        self.kv = make_kv(formats, recipes)
        self.runner = ModelRunner(
            model,
            params,
            GEOMETRY,
            Arena(GEOMETRY, NUM_UNITS),
            self.kv,
            max_rows=8,
            max_chunk_tokens=4 * PAGE_SIZE,
            max_seq_len=MAX_SEQ_LEN,
            implementation=default_implementation(),
            layer_groups=split_layers(CONFIG.layer_groups, {name: RECIPES[name] for name in recipes})
            if recipes
            else (),
        )
        self.runner.use_formats(formats)
        self.spoil()

    def spoil(self) -> None:
        """Whatever was in the arena is NaN now."""
        self.runner.arena.units = jnp.full_like(self.runner.arena.units, NAN_WORD)

    def feed(self, feeds: Sequence[Feed]) -> list[Found]:
        """Computes all feeds side by side, the i-th chunk of each in step i; then gives their pages back."""
        requests = [make_request(f"r{i}", feed.kv_precision, ()) for i, feed in enumerate(feeds)]
        found = {request: Found({}, {}) for request in requests}
        for step in range(max(len(feed.cuts) for feed in feeds)):
            both = zip(requests, feeds, strict=True)
            chunks = [self._chunk(request, feed, step) for request, feed in both if step < len(feed.cuts)]
            prefills = tuple(chunk for chunk in chunks if chunk.count > 1)
            plan = SchedulerOutput(tuple(chunk for chunk in chunks if chunk.count == 1), prefills)
            result = self.runner.execute(plan)
            for sampled in result.tokens:
                found[sampled.request].logprobs[sampled.request.num_tokens - 1] = _all_logprobs(sampled)
            for request, scores in result.scores.items():
                scored = enumerate(scores, request.scores.first - 1)
                found[request].scores.update({i: score.logprob for i, score in scored})
        for request in requests:
            self.kv.release(request)
        check_integrity(self.kv)
        return list(found.values())

    def _chunk(self, request: Request, feed: Feed, step: int) -> ScheduledChunk:
        """Grows the request to what this step computes; it does not know its later tokens yet, so that it samples."""
        start, count = sum(feed.cuts[:step]), feed.cuts[step]
        request.token_ids = list(feed.tokens[: start + count])
        request.num_computed_tokens = start
        if self.scores:
            request.num_prompt_tokens, request.scores = start + count, PromptScores(start + 1, 0)
        assert self.kv.grow(request, start + count)
        return ScheduledChunk(request, start, count)


def _all_logprobs(sampled: SampledToken) -> np.ndarray:
    """f64[VOCAB]; the sampled token is the likeliest, as these requests are greedy."""
    logprobs = np.full(VOCAB, np.nan)
    logprobs[list(sampled.logprobs.top)] = list(sampled.logprobs.top.values())
    assert sampled.token == logprobs.argmax()
    assert sampled.logprobs.logprob == logprobs.max()
    return logprobs


@functools.cache
def expected_logprobs(kv_precision: str, tokens: tuple[int, ...]) -> np.ndarray:
    """f64[tokens, VOCAB], the log-probabilities after each token, of a plain forward pass.

    Keys and values of a token's own page are seen as the residual format keeps them, those of earlier pages as the full
    format does.
    """
    _, params = tiny_model()
    padded = np.zeros(MAX_SEQ_LEN, np.int32)
    padded[: len(tokens)] = tokens
    logits = np.asarray(_forward(kv_precision, params, padded)[: len(tokens)], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# Compiled as the engine's programs are, so that the same product has the same bits.
@functools.partial(jax.jit, static_argnums=0, compiler_options=compiler_options())
def _forward(kv_precision: str, params, tokens):
    model, _ = tiny_model()
    positions = jnp.arange(MAX_SEQ_LEN)
    pages = positions // PAGE_SIZE
    same_page = pages[:, None] == pages
    hidden = positions[:, None] < positions
    by_layer = RECIPES.get(kv_precision, (kv_precision,) * CONFIG.num_layers)
    group = CONFIG.num_heads // CONFIG.num_kv_heads

    def attend(layer, q, k, v):
        full = get_format(by_layer[layer])
        newest = get_format(full.residual or full.name)
        residual = _as_kept(newest, k, v)
        (k_own, v_own), (k_old, v_old) = (
            [jnp.repeat(part, group, axis=1) for part in parts]
            for parts in (residual, residual if newest is full else _as_kept(full, *residual))
        )
        own, old = (jnp.einsum("qhd,khd->hqk", q, k, precision="highest") for k in (k_own, k_old))
        logits = jnp.where(hidden, -jnp.inf, jnp.where(same_page, own, old) * CONFIG.attention_scale)
        weights = jax.nn.softmax(logits, axis=-1)
        of_own, of_old = jnp.where(same_page, weights, 0.0), jnp.where(same_page, 0.0, weights)
        mixed = [jnp.einsum("hqk,khd->qhd", w, v, precision="highest") for w, v in ((of_own, v_own), (of_old, v_old))]
        return mixed[0] + mixed[1]

    hidden_states = model.apply({"params": params}, tokens, positions, attend)
    return model.apply({"params": params}, hidden_states, method="logits")


def _as_kept(kv_format, k, v):
    """f32[tokens, kv_heads, D] as pages of the format keep them."""
    pages = (CONFIG.num_kv_heads, -1, PAGE_SIZE, CONFIG.head_dim)
    words = kv_format.encode_vectors(*(part.swapaxes(0, 1).reshape(pages) for part in (k, v)))
    read = kv_format.decode_vectors(words)
    flat = (CONFIG.num_kv_heads, k.shape[0], CONFIG.head_dim)
    return [part.reshape(flat).swapaxes(0, 1) for part in read]

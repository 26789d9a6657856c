"""The static side of a step: what a compiled program is specialised for, and which sizes there are."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.sharding import Mesh

from fineserve_jax.models import CausalLM, LayerGroup
from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.pallas_kernels.formats import KVFormat, get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.implementation import Implementation
from fineserve_jax.pallas_kernels.specs import AttentionSpec, WriteSpec

# Steps with fewer rows are padded to this: XLA's CPU products of bf16 and int8 are several times slower with fewer.
MIN_ROWS = 8


@dataclass(frozen=True)
class StepShape:
    """Slots of a step, all padded: one program is compiled for each shape that occurs.

    Attributes:
        rows: slots for tokens that are decoded, and for tokens that are sampled.
        chunk_tokens: slots for prefill chunks, a multiple of the page size; 0 for a step that only decodes.
    """

    rows: int
    chunk_tokens: int


@dataclass(frozen=True)
class StepSpec:
    """All that is static for `jit` in a step.

    Attributes:
        model: the Flax module; its parameters are an argument of the step.
        geometry: of the model's pages, were they of all layers; of several devices those of each.
        format_names: KV formats the step reads and writes; format ids are indices into it. Residual formats are in it.
        shape: slots of the step.
        max_pages: pages of the longest sequence.
        max_runs: most runs of pages of different formats that a request has, its residual page aside.
        implementation: of the kernels.
        interpret: whether kernels are interpreted; None: if this platform cannot compile them.
        packs: see `AttentionSpec`.
        drafts: whether a decode may have several rows, each of which sees those ahead of it.
        shares: whether decode rows attend together to tokens that they share, where that pays.
        mesh: the devices that compute the step together; None: one does.
        layer_groups: the model's layers whose pages are apart, where KV formats differ by layer, and each group has
            format ids of its own; (): the model's groups, in one format each request.
    """

    model: CausalLM
    geometry: PageGeometry
    format_names: tuple[str, ...]
    shape: StepShape
    max_pages: int
    max_runs: int = 1
    implementation: Implementation = "xla"
    interpret: bool | None = None
    packs: bool = True
    drafts: bool = False
    shares: bool = False
    mesh: Mesh | None = None
    layer_groups: tuple[LayerGroup, ...] = ()

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The model's layers whose pages are apart: by how far back they attend, and by their formats."""
        return self.layer_groups or self.model.config.layer_groups

    def rope_number(self, group: int) -> int:
        """Number of the model's layer group, as `embed_tokens` has rotations for, that a group is of."""
        windows = [own.window for own in self.model.config.layer_groups]
        return windows.index(self.groups[group].window)

    @property
    def formats(self) -> tuple[KVFormat, ...]:
        return tuple(get_format(name) for name in self.format_names)

    def residual_of(self, kv_format: KVFormat) -> KVFormat:
        """The format of the newest tokens of requests in a page-wise format."""
        return next(residual for residual in self.formats if residual.name == kv_format.residual)

    @property
    def token_formats(self) -> dict[int, KVFormat]:
        """Format id -> format, of those that encode token by token."""
        return {i: f for i, f in enumerate(self.formats) if f.residual is None}

    @property
    def paged_formats(self) -> dict[int, KVFormat]:
        """Format id -> format, of those that encode whole pages."""
        return {i: f for i, f in enumerate(self.formats) if f.residual is not None}

    @property
    def query_dtype(self) -> jnp.dtype:
        """What attention takes its products in: f32 where the weights are kept so, else what suits the backend."""
        return jnp.dtype(jnp.float32) if self.model.weights == "fp32" else get_backend(self.implementation).query_dtype

    @property
    def chunk_pages(self) -> int:
        return self.shape.chunk_tokens // self.geometry.page_size

    def decode_attention(self, group: LayerGroup) -> AttentionSpec:
        """The decode rows' attention to their cached tokens, in layers of the group."""
        return self._attention(group, self.shape.rows)

    def may_share(self, group: LayerGroup) -> bool:
        """Whether decode rows may attend together to what they have in common: where a step only decodes, each row by
        itself, and all that is cached is attended to."""
        alone = self.drafts or not self.packs or self.shape.rows == 1
        return self.shares and not alone and not self.shape.chunk_tokens and group.window is None

    def shared_attention(self, group: LayerGroup) -> AttentionSpec:
        """The decode rows' attention to cached tokens that some of them share; its rows are groups of them."""
        return self._attention(group, self.shape.rows // 2, self.shape.rows)

    def chunk_attention(self, group: LayerGroup) -> AttentionSpec:
        """The chunks' attention to their cached tokens, in layers of the group."""
        return self._attention(group, self.chunk_pages, self.shape.chunk_tokens)

    def writing(self, group: LayerGroup) -> WriteSpec:
        """What a step writes of the group's layers."""
        return WriteSpec(self.group_geometry(group), self.formats, self.implementation, self.interpret)

    def group_geometry(self, group: LayerGroup) -> PageGeometry:
        """Of the pages of a layer group."""
        return replace(self.geometry, num_layers=len(group.layers))

    def _attention(self, group: LayerGroup, num_rows: int, num_queries: int | None = None) -> AttentionSpec:
        return AttentionSpec(
            self.group_geometry(group),
            self.formats,
            num_rows,
            self.max_pages,
            num_queries,
            segments_per_row=self.max_runs + (1 if self.paged_formats else 0),
            window=group.window,
            soft_cap=self.model.config.attention_soft_cap,
            packs=self.packs,
            implementation=self.implementation,
            interpret=self.interpret,
        )


def row_buckets(max_rows: int, *, single: bool = False) -> tuple[int, ...]:
    """Powers of two from `MIN_ROWS` until they hold `max_rows`; with `single` also 1, for who is alone."""
    buckets = [MIN_ROWS]
    while buckets[-1] < max_rows:
        buckets.append(2 * buckets[-1])
    return (1, *buckets) if single else tuple(buckets)


def chunk_buckets(max_chunk_tokens: int, page_size: int) -> tuple[int, ...]:
    """Sizes that chunks are padded to: `max_chunk_tokens`, and halves of it down to about 64 tokens."""
    buckets = [max_chunk_tokens]
    while buckets[0] >= 128 and buckets[0] % (2 * page_size) == 0:
        buckets.insert(0, buckets[0] // 2)
    return tuple(buckets)


def pick(buckets: tuple[int, ...], size: int) -> int:
    """The smallest bucket that holds `size`."""
    return next(bucket for bucket in buckets if bucket >= size)

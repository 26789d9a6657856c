"""Memory that is short on purpose: an engine to measure what `auto` costs under a pressure that somebody names.

share   |------ 1 / pressure of what all tokens of a request take in bf16 ------|
held    | int4 | int4 | int4 | int8 | int8 | bf16 | bf16 | room for a page more |
"""

import dataclasses
import math
from collections.abc import Sequence

import jax

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import AUTO, EngineConfig
from fineserve_jax.engine.precision import WIDEST_OF_AUTO, Precision
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.request.request import Request

PAGES_AT_A_TIME = 32


class EngineUnderPressure(Engine):
    """Narrows requests in `auto` as if requests wanted `pressure` times the memory that there is.

    Each request may hold an equal share, `1 / pressure` of what all its tokens, those to come included, take in the
    format it starts in. Ahead of each step its oldest pages are narrowed, in the engine's own order, until it is within
    its share with a page more, or until only its newest `narrow_keep_pages` pages are left. A step computes no more
    than a page of prompts, so that each token sees the older ones as narrow as it would while decoding.

    Args:
        model: to be served.
        config: settings; precision, the size of chunks and whether steps are called ahead are set here.
        pressure: more than 1.
        devices: see `Engine`.

    Raises:
        ConfigError: a pressure of 1 or less, or settings with which nothing is narrowed.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        pressure: float,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        if not 1 < pressure < math.inf:
            raise ConfigError(
                f"pressure={pressure:g}: requests that want no more memory than there is are not narrowed; give more "
                "than 1, such as 2 for twice as much"
            )
        own = {"kv_precision": AUTO, "min_kv_precision": None, "max_chunk_tokens": config.page_size}
        super().__init__(model, EngineConfig(**{**dict(config), **own, "async_scheduling": False}), devices=devices)
        self.pressure = pressure

    def check_share(self, precision: Precision, num_tokens: int) -> None:
        """Raises `RequestError` for a length at which a request exceeds its share with all narrowed that may be."""
        if precision.start != WIDEST_OF_AUTO:
            raise RequestError(
                f"{num_tokens} tokens in {WIDEST_OF_AUTO} do not fit the KV memory, and {AUTO} would start narrower; "
                "raise kv_memory, or give shorter windows"
            )
        steps = self.kv.ladder(self.served().name, *precision)
        num_full, keep_pages = (num_tokens - 1) // self.config.page_size, self.config.narrow_keep_pages
        wanted = least = 0
        for wide, narrow in zip(steps[0].groups, steps[-1].groups, strict=True):
            most = wide.most_pages(num_tokens)
            held = min(num_full, most)
            kept = min(held, keep_pages)
            wanted += most * wide.page_units
            least += (kept + 1) * wide.page_units + (held - kept) * narrow.page_units
        if wanted < self.pressure * least:
            bearable = math.floor(100 * wanted / least) / 100
            raise RequestError(
                f"pressure={self.pressure:g} is more than {num_tokens} tokens bear, {bearable:g}, since the newest "
                f"{keep_pages} full pages and the next one stay in {precision.start}; give less, or longer windows"
            )

    def step(self) -> list[Request]:
        advanced = super().step()
        for request in tuple(self.kv.requests):
            if request.min_kv_precision is not None:
                self._narrow(request)
        return advanced

    def _narrow(self, request: Request) -> None:
        """Narrows a request until it is within its share with a page more, or as far as it may be."""
        kv, keep_pages = self.kv, self.config.narrow_keep_pages
        while (excess := self._excess_units(request)) > 0:
            what = kv.next_requantization(request, PAGES_AT_A_TIME, keep_pages)
            if what is None:
                return
            needed = math.ceil(excess / (what.source.page_units - what.target.page_units))
            if not kv.requantize_pages(request, dataclasses.replace(what, count=min(what.count, needed))):
                raise RequestError(f"no KV memory is free to narrow pages to {what.target.kv_format}; raise kv_memory")

    def _excess_units(self, request: Request) -> float:
        """Units that a request holds beyond its share, with a page more of each layer group."""
        own, num_full = self.kv.class_of(request.model, request.kv_precision), request.num_computed_tokens
        share = sum(group.most_pages(request.max_total_tokens) * group.page_units for group in own.groups)
        held = sum(group.page_units for group in own.groups)
        for pages in self.kv.holds(request).groups:
            parts = pages.parts(0, num_full // own.page_size)
            held += sum(run.page_class.page_units * len(run.handles) for run in parts)
        return held - share / self.pressure

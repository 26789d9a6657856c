"""A workload and an engine without a device, to see how memory is used: the real scheduler and the real KV manager.

Only the model is left out: a step's time is fixed, and every sampled token is a number.
"""

import csv
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fineserve_jax.engine.page_shapes import WORD_BYTES, page_classes, page_geometry
from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.slab_size import choose_slab_units
from fineserve_jax.models import ModelConfig
from fineserve_jax.request.request import FinishReason, Request, RequestTimes
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler import DeviceRoofline, FormatCost, ModelCost, Scheduler, SchedulerConfig

MODEL = "smollm2"
SHAPE = ModelConfig(  # SmolLM2-135M
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
)
STEP_S = 0.05
MIX = ("bf16", "int8", "int4")
# Of azure_llm_2023_conv.csv at PERCENTS, to draw from where the file is not.
PERCENTS = (0, 5, 25, 50, 75, 90, 95, 99, 100)
PROMPTS = (2, 181, 396, 1020, 1189, 2734, 4083, 4142, 14050)
OUTPUTS = (7, 41, 85, 129, 395, 424, 451, 601, 1000)
LONGEST = 14089


@dataclasses.dataclass(frozen=True)
class Memory:
    """One way to divide an arena.

    Attributes:
        policy: "elastic", "partitioned" or "uniform".
        slabs: "chosen" by `choose_slab_units`, or "lcm": the least common multiple of the page lengths.
        compacts: whether pages are moved together.
    """

    policy: str = "elastic"
    slabs: str = "chosen"
    compacts: bool = True


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Prompt and output tokens of requests, i64[n] each, to draw from."""

    prompts: np.ndarray
    outputs: np.ndarray
    source: str


def read_lengths(trace: Path, context: int) -> Lengths:
    """Lengths of a trace, or of one like it where there is no such file, scaled so that the longest request of the
    trace takes `context` tokens."""
    if trace.exists():
        with trace.open() as file:
            rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
        prompts, outputs = np.array(rows).T
        source, longest = trace.name, int((prompts + outputs).max())
    else:
        rng = np.random.default_rng(0)
        prompts, outputs = (np.interp(rng.uniform(0, 100, 20_000), PERCENTS, values) for values in (PROMPTS, OUTPUTS))
        source, longest = "percentiles of azure_llm_2023_conv.csv", LONGEST
    scale = context / longest
    scaled = [np.maximum(1, np.rint(part * scale)).astype(np.int64) for part in (prompts, outputs)]
    return Lengths(
        np.minimum(scaled[0], context - 1), np.minimum(scaled[1], context - scaled[0].clip(max=context - 1)), source
    )


def make_classes(page_size: int) -> tuple[dict[tuple[str, str], PageClass], int]:
    """Page classes of the formats, and the bytes of a unit."""
    geometry = page_geometry(SHAPE, page_size)
    return page_classes(MODEL, geometry, MIX), WORD_BYTES * geometry.unit_words


class World:
    """An engine without a device.

    Args:
        memory: how the arena is divided.
        kv_bytes: its size.
        classes, unit_bytes: as `make_classes` gives them.
        ageing_s, chunk_tokens: see `SchedulerConfig`.
    """

    def __init__(
        self,
        memory: Memory,
        kv_bytes: int,
        classes: Mapping[tuple[str, str], PageClass],
        unit_bytes: int,
        ageing_s: float,
        chunk_tokens: int,
    ) -> None:
        units = [page_class.page_units for page_class in classes.values()]
        num_units = kv_bytes // unit_bytes
        slab_units = math.lcm(*units) if memory.slabs == "lcm" else choose_slab_units(units, num_units)
        allocator = SlabAllocator(num_units, slab_units, memory.policy, classes.values(), unit_bytes=unit_bytes)
        reserve = min(max(2, allocator.num_slabs // 64), allocator.num_slabs // 8) if memory.compacts else 0
        self.kv = KVManager(allocator, classes, prefix_cache="off", reserve_slabs=reserve, compacts=memory.compacts)
        self.unit_bytes = unit_bytes
        page_size = next(iter(classes.values())).page_size
        config = SchedulerConfig(
            max_batch_size=100_000, max_chunk_tokens=chunk_tokens, page_size=page_size, ageing_s=ageing_s
        )
        costs = {name: FormatCost(c.page_bytes, c.page_bytes / c.page_size) for (_, name), c in classes.items()}
        cost = ModelCost(flops_per_token=2.7e8, flops_per_pair=7e4, weight_bytes=2.7e8, formats=costs)
        self.scheduler = Scheduler(config, self.kv, {MODEL: cost}, DeviceRoofline(1e14, 1e12))
        self.now = 0.0
        self.moved_bytes = 0

    def step(self) -> Iterator[None]:
        """One step; pauses once, where its tokens are computed and the requests that end with it still hold theirs."""
        output = self.scheduler.schedule(self.now)
        self.now += STEP_S
        for operation in self.kv.take_operations():
            self.moved_bytes += operation.target_class.page_units * self.unit_bytes
        if output is None:
            yield
            return
        advanced = self.scheduler.commit(output, [0] * len(output.chunks), self.now)
        yield
        for request in advanced:
            if request.num_tokens == request.max_total_tokens:
                self.scheduler.finish(request, FinishReason.LENGTH, self.now)

    def add(self, number: int, kv_format: str, prompt: int, output: int) -> None:
        request = Request(
            request_id=str(number),
            model=MODEL,
            kv_precision=kv_format,
            sampling=SamplingParams(max_tokens=output),
            token_ids=[number] * prompt,
            num_prompt_tokens=prompt,
            max_total_tokens=prompt + output,
            sequence=number,
            times=RequestTimes(self.now),
        )
        if self.kv.fits_alone(MODEL, kv_format, request.max_total_tokens):
            self.scheduler.add(request)

    @property
    def granted_bytes(self) -> float:
        """Exact bytes of the tokens that pages were given for: those cached, and those of admitted prompts to come."""
        total = 0.0
        for request in self.kv.requests:
            waits = request.num_uncomputed_tokens > 1
            tokens = request.num_tokens if waits else request.num_computed_tokens
            page_class = self.kv.holds(request).page_class
            if page_class.residual is not None:
                full = page_class.num_pages(tokens) * page_class.page_size
                total += (tokens - full) * page_class.residual.page_bytes / page_class.page_size
                tokens = full
            total += tokens * page_class.page_bytes / page_class.page_size
        return total

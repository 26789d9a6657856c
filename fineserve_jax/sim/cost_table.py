"""Cost models from tables of measured latencies: the step profile, fitted to the rows of one configuration.

A table has the columns model, qformat, tp, mps_percentage, batch_size, input_len, output_len, ttft and tpot, as
those that the FineServe authors published (llm-fineserve/FineServe, BSD-3-Clause). A row gives two steps: the
prefill of the whole batch, which takes `ttft`, and the decode step half-way through the answers, which takes `tpot`.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fineserve_jax.errors import ConfigError
from fineserve_jax.scheduler.costs import ModelCost, StepCost
from fineserve_jax.scheduler.devices import DeviceRoofline, DeviceSpec
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.sim.efficiency import Efficiency
from fineserve_jax.sim.models import SHAPES, ModelVariant, get_cache

QFORMATS = {"org": ("bf16", "bf16"), "fp8_kv8": ("fp8", "fp8"), "awq": ("awq", "bf16"), "qoq": ("qoq", "int4")}
"""Quantisation format of a table -> precision of the weights, KV format."""
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a row was measured on: a model, its formats, devices in its group, percent of their cores it had."""

    model: str
    qformat: str
    tp: int = 1
    share: int = 100

    @property
    def variant(self) -> ModelVariant:
        return ModelVariant(SHAPES[self.model], QFORMATS[self.qformat][0], self.tp)

    @property
    def cost(self) -> ModelCost:
        return self.variant.cost([QFORMATS[self.qformat][1]], PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A row of the table: requests that were served together, seconds to the first and to each further token."""

    configuration: Configuration
    batch_size: int
    input_len: int
    output_len: int
    ttft_s: float
    tpot_s: float

    def prefill(self) -> StepCost:
        tokens = self.batch_size * self.input_len
        return StepCost(tokens, tokens * (self.input_len + 1) // 2, 0.0)

    def decode(self) -> StepCost:
        """The step half-way through the answers."""
        (cached,) = self.configuration.cost.formats.values()
        tokens = self.batch_size * (self.input_len + self.output_len / 2)
        return StepCost(self.batch_size, 0, tokens * cached.bytes_per_token, round(tokens))


def read_table(path: str | Path) -> list[Measurement]:
    """The rows of a table, those of models without a known shape left out.

    Raises:
        ConfigError: a file that cannot be read, lacks a column, or has no row that is of use.
    """
    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        rows = [_row(line) for line in lines if line["model"] in SHAPES and line["qformat"] in QFORMATS]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is no table of measured costs: {error!r}") from None
    if not rows:
        raise ConfigError(f"{path} has no row of a known model and format; models: {', '.join(SHAPES)}")
    return rows


def _row(line: dict[str, str]) -> Measurement:
    share = int(line.get("mps_percentage") or 100)
    return Measurement(
        Configuration(line["model"], line["qformat"], int(line["tp"]), share),
        int(line["batch_size"]),
        int(line["input_len"]),
        int(line["output_len"]),
        float(line["ttft"]),
        float(line["tpot"]),
    )


class CostTable:
    """Cost models of every configuration in some rows.

    Args:
        rows: what was measured.
        device: where; its roofline is what a fit starts from, and what a configuration without rows gets.
        efficiency: of that roofline.
    """

    def __init__(self, rows: Iterable[Measurement], device: DeviceSpec, efficiency: Efficiency) -> None:
        self._device, self._efficiency = device, efficiency
        grouped: defaultdict[Configuration, list[Measurement]] = defaultdict(list)
        for row in rows:
            grouped[row.configuration].append(row)
        self.profiles = {configuration: self._fit(configuration, group) for configuration, group in grouped.items()}

    def _fit(self, configuration: Configuration, rows: Iterable[Measurement]) -> StepProfile:
        steps = [(row.prefill(), row.ttft_s) for row in rows] + [(row.decode(), row.tpot_s) for row in rows]
        return roofline_profile(configuration, self._device, self._efficiency).fit(steps)

    def profile(self, model: ModelVariant, kv_format: str, share: int = 100) -> StepProfile:
        """The cost model of a model variant, with requests in one KV format or several.

        A table has one KV format for each qformat. Other formats read their own number of bytes at the speed at
        which that one was read.

        Raises:
            ConfigError: a configuration that the table does not have.
        """
        get_cache(kv_format)
        fitting = [
            configuration
            for configuration in self.profiles
            if (configuration.variant, configuration.share) == (model, share)
        ]
        if not fitting:
            known = sorted({f"{c.variant.name} tp={c.tp} share={c.share}" for c in self.profiles})
            raise ConfigError(f"the table has no {model.name} tp={model.tp} share={share}; it has {', '.join(known)}")
        same_kv = [configuration for configuration in fitting if QFORMATS[configuration.qformat][1] == kv_format]
        return self.profiles[(same_kv or fitting)[0]]


def roofline_profile(configuration: Configuration, device: DeviceSpec, efficiency: Efficiency) -> StepProfile:
    """The cost model that needs no rows. With a part of the cores, products take longer and reading does not."""
    whole = configuration.variant.roofline(device, efficiency)
    part = DeviceRoofline(whole.flops * configuration.share / 100, whole.bandwidth, whole.overhead_s)
    return StepProfile(configuration.cost, part)

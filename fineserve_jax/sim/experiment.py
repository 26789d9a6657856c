"""Several systems, each at several rates, on one workload: what `fineserve-jax simulate` and the benchmarks run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fineserve_jax.errors import ConfigError
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.sim.metrics import Summary, summarize
from fineserve_jax.sim.models import ModelVariant, get_cache, parse_model
from fineserve_jax.sim.records import Run
from fineserve_jax.sim.simulator import Simulator, StepTimer
from fineserve_jax.sim.systems import Cluster, System, build, prepare
from fineserve_jax.sim.workload import Arrival, Kind, scale_rate, updated


@dataclass(frozen=True)
class Result:
    """One system at one rate."""

    system: str
    rate_scale: float
    rate: float
    summary: Summary
    run: Run


@dataclass(frozen=True)
class Experiment:
    """What is the same for all runs.

    Attributes:
        arrivals: the workload at rate scale 1; every one names its model and KV format.
        cluster: where.
        timers: cost models by model name; rooflines for the others.
        settings: fields of `SchedulerConfig` for all systems.
    """

    arrivals: Sequence[Arrival]
    cluster: Cluster
    timers: Mapping[str, StepTimer] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)

    def run(self, system: System, rate_scale: float = 1.0, *, record_steps: bool = False) -> Result:
        """One simulation, from empty to the end."""
        arrivals = prepare(system, scale_rate(self.arrivals, rate_scale))
        span = arrivals[-1].arrival_s if arrivals else 0.0
        scheduler, kv, timers = build(system, self.cluster, self.timers, **self.settings)
        simulator = Simulator(
            scheduler,
            kv,
            timers,
            record_steps=record_steps,
            sample_s=max(span / 200, 0.25),
        )
        run = simulator.run(arrivals)
        return Result(system.name, rate_scale, len(arrivals) / span if span else 0.0, summarize(run), run)

    def run_all(
        self, systems: Iterable[System], rate_scales: Sequence[float], *, record_steps: bool = False
    ) -> list[Result]:
        """All systems at all rates; steps are recorded at the last rate only."""
        return [
            self.run(system, scale, record_steps=record_steps and scale == rate_scales[-1])
            for system in systems
            for scale in rate_scales
        ]


def parse_mix(words: Iterable[str], tp: int = 1) -> tuple[list[Kind], dict[ModelVariant, tuple[str, ...]]]:
    """A mix such as `llama-3.1-8b@awq/int4=2 llama-3.1-8b/bf16=1`: model, its weights, KV format and share.

    Returns:
        the kinds, and the KV formats of each model.

    Raises:
        ConfigError: a word that cannot be read, or names something unknown.
    """
    kinds: list[Kind] = []
    formats: dict[ModelVariant, tuple[str, ...]] = {}
    for word in words:
        described, _, share = word.partition("=")
        name, slash, kv_format = described.rpartition("/")
        try:
            weight = float(share) if share else 1.0
        except ValueError:
            weight = -1.0
        if not slash or not weight > 0:
            raise ConfigError(f"mix {word!r}: write MODEL[@WEIGHTS]/KV_FORMAT[=SHARE], such as llama-3.1-8b@awq/int4=2")
        model = parse_model(name, tp)
        get_cache(kv_format)
        formats[model] = tuple(dict.fromkeys((*formats.get(model, ()), kv_format)))
        kinds.append(Kind(weight, RequestOptions(model=model.name, kv_precision=kv_format)))
    if not kinds:
        raise ConfigError("the mix is empty; name at least one MODEL/KV_FORMAT")
    return kinds, formats


def check_arrivals(arrivals: Sequence[Arrival], cluster: Cluster) -> None:
    """Raises ConfigError, by its number, for an arrival that names what is not served."""
    for number, arrival in enumerate(arrivals):
        if arrival.kv_precision not in cluster.kv_formats.get(arrival.model, ()):
            served = ", ".join(f"{model}/{name}" for model, names in cluster.kv_formats.items() for name in names)
            raise ConfigError(
                f"request {number} wants {arrival.model}/{arrival.kv_precision}; the mix serves {served}; add it there"
            )


def with_targets(kinds: Iterable[Kind], ttft_slo_s: float | None, tpot_slo_s: float | None) -> list[Kind]:
    """The kinds with these targets."""
    return [Kind(kind.share, updated(kind.options, ttft_slo_s=ttft_slo_s, tpot_slo_s=tpot_slo_s)) for kind in kinds]

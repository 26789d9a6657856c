"""What an engine tells of itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.stats import ClassStats
from fineserve_jax.kv.usage import FormatUsage, KVCounts, count_events, measure_classes, measure_usage
from fineserve_jax.request.request import SchedulerOutput, num_branch_tokens
from fineserve_jax.runner.runner import StepResult
from fineserve_jax.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class ModelStats:
    """How one model of an engine stands.

    Attributes:
        weights: precision of its weights.
        kv: per KV format, what its pages take of the arena; of layers with a window, where others have none, under a
            name such as "int8 (group 1)".
        prediction_error: typical relative error of its predicted step times; None before there is one.
    """

    weights: str
    kv: dict[str, ClassStats]
    prediction_error: float | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How the engine stands and what it did so far.

    Attributes:
        kv: per KV format, over all models, bytes needed, reserved and free.
        kv_bytes: the arena's size.
        kv_counts: pages shared, narrowed, moved and so on since the start.
        num_waiting, num_running: requests without and with memory.
        num_prompt_tokens, num_output_tokens: computed and sampled tokens since the start.
        output_tokens_per_s: sampled tokens over the time spent in steps, compilation included.
        num_steps, num_preemptions, num_compilations: since the start.
        prediction_error: typical relative error of predicted step times, the largest of the models'; None before there
            is one.
        models: each model's part, by name.
        num_drafts, num_accepted_drafts: tokens that were computed as guesses, and those that turned out to be what is
            sampled there, since the start.
        host_s_per_step: seconds of a step in which the host does not wait for the device: planning, laying out inputs,
            calling programs, committing; the device may be at work meanwhile. A mean since the start over steps that
            compiled nothing; None before there is one.
    """

    kv: dict[str, FormatUsage]
    kv_bytes: int
    kv_counts: KVCounts
    num_waiting: int
    num_running: int
    num_prompt_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float
    num_steps: int
    num_preemptions: int
    num_compilations: int
    prediction_error: float | None
    models: dict[str, ModelStats]
    num_drafts: int = 0
    num_accepted_drafts: int = 0
    host_s_per_step: float | None = None


@dataclass(slots=True)
class StepTotals:
    """What was computed since the engine started.

    Attributes:
        prompt_tokens, output_tokens: computed and sampled.
        busy_s: spent in steps, compilation included.
        warm_steps, host_s: of the steps, those that compiled nothing, and the seconds of those in which the host
            did not wait for the device.
    """

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    busy_s: float = 0.0
    warm_steps: int = 0
    host_s: float = 0.0

    def add_step(self, seconds: float, output: SchedulerOutput, result: StepResult, *, compiled: bool) -> None:
        """Counts a step that took so long. `compiled`: whether programs were."""
        if not compiled:
            self.warm_steps += 1
            self.host_s += seconds - result.waited_s
        self.steps += 1
        self.busy_s += seconds
        self.output_tokens += len(result.tokens)
        self.prompt_tokens += sum(
            max(0, min(chunk.start + chunk.count, chunk.request.num_prompt_tokens) - chunk.start)
            + num_branch_tokens(chunk.branches)
            for chunk in output.chunks
        )


def engine_stats(
    models: Mapping[str, ServedModel],
    kv: KVManager,
    kv_bytes: int,
    scheduler: Scheduler,
    totals: StepTotals,
    num_compilations: int,
) -> EngineStats:
    """Where an engine stands now. `kv_bytes`: the arena's size."""
    by_model = _model_stats(models, kv, scheduler)
    errors = [model.prediction_error for model in by_model.values() if model.prediction_error is not None]
    return EngineStats(
        kv=measure_usage(kv).formats,
        kv_bytes=kv_bytes,
        kv_counts=count_events(kv),
        num_waiting=scheduler.num_waiting,
        num_running=scheduler.num_running,
        num_prompt_tokens=totals.prompt_tokens,
        num_output_tokens=totals.output_tokens,
        output_tokens_per_s=totals.output_tokens / totals.busy_s if totals.busy_s else 0.0,
        num_steps=totals.steps,
        num_preemptions=scheduler.num_preemptions,
        num_compilations=num_compilations,
        prediction_error=max(errors, default=None),
        models=by_model,
        num_drafts=scheduler.speculation.num_drafts,
        num_accepted_drafts=scheduler.speculation.num_accepted,
        host_s_per_step=totals.host_s / totals.warm_steps if totals.warm_steps else None,
    )


def _model_stats(models: Mapping[str, ServedModel], kv: KVManager, scheduler: Scheduler) -> dict[str, ModelStats]:
    by_format: dict[str, dict[str, ClassStats]] = {name: {} for name in models}
    for page_class, stats in measure_classes(kv).items():
        by_format[page_class.model][page_class.format_and_group] = stats
    return {
        name: ModelStats(served.model.weights, by_format[name], scheduler.profiles[name].error)
        for name, served in models.items()
    }

"""What an engine tells of itself."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.stats import ClassStats
from fineserve_jax.kv.usage import FormatUsage, KVCounts, count_events, measure_classes, measure_usage
from fineserve_jax.request.request import SchedulerOutput, num_branch_tokens
from fineserve_jax.runner.arena import Arena
from fineserve_jax.runner.results import StepResult
from fineserve_jax.scheduler import Scheduler

Counts = TypeVar("Counts")


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
        kv: per KV format, over all models, bytes needed, reserved and free; of several devices those of each.
        kv_bytes: the arena's size; of several devices that of each.
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
        host_s_per_step: seconds of processor time that a step takes of the engine's thread: planning, laying out
            inputs, calling programs, committing; the device may be at work meanwhile. A mean since the start over steps
            that compiled nothing; None before there is one.
        num_ahead_steps: steps of the engine that were called before the ones ahead of them were computed, since the
            start.
        num_devices: how many compute each step together.
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
    num_ahead_steps: int = 0
    num_devices: int = 1


@dataclass(slots=True)
class StepTotals:
    """What was computed since the engine started.

    Attributes:
        prompt_tokens, output_tokens: computed and sampled.
        busy_s: spent in steps, compilation included.
        warm_steps, host_s: of the steps, those that compiled nothing, and the processor time of the engine's thread in
            those.
        ahead_steps: of the steps, those that were called before the ones ahead of them were computed.
    """

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    busy_s: float = 0.0
    warm_steps: int = 0
    host_s: float = 0.0
    ahead_steps: int = 0

    def add_step(
        self, output: SchedulerOutput, result: StepResult, *, seconds: float, host_s: float, compiled: bool, ahead: bool
    ) -> None:
        """Counts a step.

        Args:
            seconds, host_s: that it took, and of the processor time of the engine's thread.
            compiled: whether programs were.
            ahead: whether it was called before the step ahead of it was computed.
        """
        if not compiled:
            self.warm_steps += 1
            self.host_s += host_s
        self.ahead_steps += ahead
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
    arena: Arena,
    scheduler: Scheduler,
    totals: StepTotals,
    num_compilations: int,
) -> EngineStats:
    """Where an engine stands now."""
    by_model = _model_stats(models, kv, scheduler)
    errors = [model.prediction_error for model in by_model.values() if model.prediction_error is not None]
    return EngineStats(
        kv=measure_usage(kv).formats,
        kv_bytes=arena.nbytes,
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
        num_ahead_steps=totals.ahead_steps,
        num_devices=arena.group.size,
    )


def _model_stats(models: Mapping[str, ServedModel], kv: KVManager, scheduler: Scheduler) -> dict[str, ModelStats]:
    by_format: dict[str, dict[str, ClassStats]] = {name: {} for name in models}
    for page_class, stats in measure_classes(kv).items():
        if page_class.model in by_format:  # else what an unloading that was cut short has left
            by_format[page_class.model][page_class.precision_and_group] = stats
    return {
        name: ModelStats(served.model.weights, by_format[name], scheduler.profiles[name].error)
        for name, served in models.items()
    }


def joint_stats(parts: Sequence[EngineStats]) -> EngineStats:
    """How several engines stand together: sums, of devices too, the largest prediction error, and the mean time of the
    host's part of a step, by the number of steps. A model that several serve is told of as one."""
    if len(parts) == 1:
        return parts[0]
    kv: dict[str, list[FormatUsage]] = {}
    models: dict[str, list[ModelStats]] = {}
    for part in parts:
        for name, usage in part.kv.items():
            kv.setdefault(name, []).append(usage)
        for name, model in part.models.items():
            models.setdefault(name, []).append(model)
    timed = [(part.host_s_per_step, part.num_steps) for part in parts if part.host_s_per_step is not None]
    host_s = sum(seconds * steps for seconds, steps in timed) / max(1, sum(steps for _, steps in timed))
    return EngineStats(
        kv={name: _sum_of(listed) for name, listed in kv.items()},
        kv_bytes=sum(part.kv_bytes for part in parts),
        kv_counts=_sum_of([part.kv_counts for part in parts]),
        num_waiting=sum(part.num_waiting for part in parts),
        num_running=sum(part.num_running for part in parts),
        num_prompt_tokens=sum(part.num_prompt_tokens for part in parts),
        num_output_tokens=sum(part.num_output_tokens for part in parts),
        output_tokens_per_s=sum(part.output_tokens_per_s for part in parts),
        num_steps=sum(part.num_steps for part in parts),
        num_preemptions=sum(part.num_preemptions for part in parts),
        num_compilations=sum(part.num_compilations for part in parts),
        prediction_error=_largest(part.prediction_error for part in parts),
        models={name: _joint_model(listed) for name, listed in models.items()},
        num_drafts=sum(part.num_drafts for part in parts),
        num_accepted_drafts=sum(part.num_accepted_drafts for part in parts),
        host_s_per_step=host_s if timed else None,
        num_devices=sum(part.num_devices for part in parts),
    )


def _joint_model(parts: Sequence[ModelStats]) -> ModelStats:
    classes: dict[str, list[ClassStats]] = {}
    for part in parts:
        for name, stats in part.kv.items():
            classes.setdefault(name, []).append(stats)
    kv = {name: _sum_of(listed) for name, listed in classes.items()}
    return ModelStats(parts[0].weights, kv, _largest(part.prediction_error for part in parts))


def _sum_of(parts: Sequence[Counts]) -> Counts:
    """The sum of records of numbers, field by field."""
    first: Any = parts[0]
    return replace(first, **{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(first)})


def _largest(errors: Iterable[float | None]) -> float | None:
    return max((error for error in errors if error is not None), default=None)

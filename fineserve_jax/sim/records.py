"""What a simulation gives: a record of each request, samples of memory and queues, and every step if asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fineserve_jax.sim.workload import Arrival


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of an arrival; times in seconds, None where it never got there.

    Attributes:
        arrival: as it came.
        admitted_s, first_token_s, finished_s: when it got memory, its first and its last token.
        num_preemptions: how often it lost its pages.
        outcome: `length` for one that got all its tokens, `late` for one that was ended because it was late, `refused`
            for one that could never fit.
    """

    arrival: Arrival
    admitted_s: float | None
    first_token_s: float | None
    finished_s: float | None
    num_preemptions: int
    outcome: str

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; 0 for a request of one token, which has none to wait for."""
        if self.outcome != "length" or self.finished_s is None or self.first_token_s is None:
            return None
        return (self.finished_s - self.first_token_s) / max(1, self.arrival.output_tokens - 1)

    @property
    def in_time(self) -> bool:
        """Whether it was answered within its targets."""
        ttft, tpot, options = self.ttft_s, self.tpot_s, self.arrival.options
        if ttft is None or tpot is None:
            return False
        ttft_met = options.ttft_slo_s is None or ttft <= options.ttft_slo_s
        return ttft_met and (options.tpot_slo_s is None or tpot <= options.tpot_slo_s)

    @property
    def end_to_end_s(self) -> float | None:
        """Seconds from arrival to the last token; None for a request that did not get there."""
        if self.outcome != "length" or self.finished_s is None:
            return None
        return self.finished_s - self.arrival.arrival_s


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step, or a run of `count` like ones, for the trace."""

    start_s: float
    end_s: float
    model: str
    num_decodes: int
    chunks: tuple[tuple[str, int, int], ...]
    count: int


@dataclass(frozen=True, slots=True)
class Sample:
    """How things stood: requests waiting and running, bytes needed and reserved in all, and reserved by format."""

    time_s: float
    num_waiting: int
    num_running: int
    needed_bytes: int
    reserved_bytes: int
    reserved_by_format: Mapping[str, int]


@dataclass
class Run:
    """What a simulation gave.

    Attributes:
        requests: one entry an arrival, in the order of arrival.
        samples: how things stood, at most one every `sample_s`.
        steps: every step, if they were to be recorded.
        end_s: clock at the end.
        usable_bytes: KV memory that can be handed out.
        num_steps, num_preemptions: counts.
        prediction_error: typical relative error of the scheduler's predictions, by model.
    """

    requests: list[RequestRecord]
    samples: list[Sample] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    end_s: float = 0.0
    usable_bytes: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prediction_error: dict[str, float | None] = field(default_factory=dict)

"""Steps on their way through the device: one that is being computed and, where it can be told, the one behind it.

    host     plan and call 1 | plan 2, call its layers | commit 1, call the head of 2 | plan 3, call its layers | ...
    device                     1 1 1 1 1 1 1 1 1 1 1 1 1  2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2   3 3

A step that is called behind another takes the tokens that one samples on the device. Its head is called when they are
known on the host too, since what may be sampled can depend on them (penalties, structured outputs). What it computes
for requests that have ended by then is dropped: their pages may be given to others at once, since the device works
in the order of the calls.
"""

from collections.abc import Mapping
from dataclasses import replace

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import Request, RequestStatus, SchedulerOutput
from fineserve_jax.runner.launched import BegunStep, LaunchedStep
from fineserve_jax.runner.page_operations import PageOperations
from fineserve_jax.runner.results import StepResult
from fineserve_jax.runner.runner import ModelRunner
from fineserve_jax.scheduler import Scheduler


class StepPipeline:
    """Calls the engine's steps.

    Args:
        models, kv, scheduler, page_operations: of the engine.
        looks_ahead: whether to call steps before those ahead of them are computed.

    Attributes:
        looks_ahead: as given; may be changed between two steps.
        computing: the requests of the step that was begun last to be collected, or is collected.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        kv: KVManager,
        scheduler: Scheduler,
        page_operations: PageOperations,
        looks_ahead: bool,
    ) -> None:
        self._models, self._kv, self._scheduler = models, kv, scheduler
        self._page_operations, self.looks_ahead = page_operations, looks_ahead
        self._next: LaunchedStep | None = None
        self.computing: tuple[Request, ...] = ()

    @property
    def is_ahead(self) -> bool:
        """Whether the next step has been called."""
        return self._next is not None

    def next(self, now: float) -> LaunchedStep | None:
        """The step that is to be collected next, which has been called, or is now; None if there is none."""
        step, self._next = self._next, None
        if step is not None:
            self._note_computing(step.output)
            return step
        output = self._scheduler.schedule(now)
        if output is None:
            return None
        self._note_computing(output)
        self._change_pages()
        return self._runner(output).launch(output)

    def begin_behind(self, step: LaunchedStep, now: float) -> BegunStep | None:
        """Calls the layers of the step behind one that is not collected yet, where it can be told what it computes."""
        if not self.looks_ahead:
            return None
        runner = self._runner(step.output)
        with self._scheduler.looking_ahead(step.output, now) as output:
            if output is None or not runner.follows(output, step):
                return None
            self._change_pages()
            return runner.begin(output, step)

    def collect(self, step: LaunchedStep) -> StepResult:
        """What a step gave, without the tokens of requests that have ended since it was called."""
        result = self._runner(step.output).collect(step)
        tokens = [token for token in result.tokens if token.request.status is not RequestStatus.FINISHED]
        return replace(result, tokens=tokens)

    def finish(self, begun: BegunStep | None) -> None:
        """Calls the rest of a step when the one ahead of it is committed, unless all its requests have ended."""
        if begun is not None and any(c.request.status is not RequestStatus.FINISHED for c in begun.output.chunks):
            self._next = self._runner(begun.output).finish(begun)

    def drop(self) -> None:
        """Forgets the step that was called ahead: none of its requests is to go on from here."""
        self._next = None
        for served in self._models.values():
            served.runner.logits_processing.forget()

    def _note_computing(self, output: SchedulerOutput) -> None:
        self.computing = tuple(chunk.request for chunk in output.chunks)

    def _change_pages(self) -> None:
        """Does what the KV manager has queued for the device."""
        self._page_operations.apply(self._kv.take_operations())
        self._scheduler.note_transfer_rate(self._page_operations.bytes_per_s)

    def _runner(self, output: SchedulerOutput) -> ModelRunner:
        return self._models[output.chunks[0].request.model].runner

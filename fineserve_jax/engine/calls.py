"""Calls of the front doors that wait for all they asked for: what each asks of the engine, and what it makes of that.

    call = Generation(prompts, ...)
    tickets = call.tickets(engine, receiver) ----> the loop serves them
    call.result(tickets) <------------------------ when all are done

How they wait is the front door's own: `LLM` on the caller's thread, `AsyncLLM` in its task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fineserve_jax.engine.intake import Encode, Intake, prepare
from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.engine.tickets import Receiver, Ticket
from fineserve_jax.errors import RequestError
from fineserve_jax.request.request_options import RequestOptions, one_each, options_of_each
from fineserve_jax.request.sampling_params import SamplingParams

Result = TypeVar("Result", covariant=True)


class Call(Protocol[Result]):
    """Something that is asked of an engine, or of several behind a router."""

    def tickets(self, engine: Intake, receiver: Receiver) -> list[Ticket]:
        """What the engine is to serve. May be called by any thread.

        Raises:
            RequestError: naming the first prompt that cannot be served.
        """

    def result(self, tickets: Sequence[Ticket]) -> Result:
        """What came of the tickets, all of which are done; raises what one of them as a whole ended with."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Answers to prompts, see `LLM.generate`.

    Attributes:
        prompts: one or more, in a list.
        encode: how they are turned into tokens.
        sampling_params, options, fields: as of `LLM.generate`.
    """

    prompts: Sequence[Any]
    encode: Encode
    sampling_params: SamplingParams | Sequence[SamplingParams] | None
    options: RequestOptions | Sequence[RequestOptions] | None
    fields: Mapping[str, Any]

    def tickets(self, engine: Intake, receiver: Receiver) -> list[Ticket]:
        count = len(self.prompts)
        params = one_each(self.sampling_params or SamplingParams(), SamplingParams, count, "sampling_params")
        option_list = options_of_each(count, self.options, self.fields)
        tickets = []
        for i, (prompt, sampling, own) in enumerate(zip(self.prompts, params, option_list, strict=True)):
            try:
                text, prepared = prepare(engine, prompt, self.encode, sampling, own)
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from None
            tickets.append(Ticket(prepared, receiver, text, i))
        return tickets

    def result(self, tickets: Sequence[Ticket]) -> list[RequestOutput]:
        return [ticket.output() for ticket in tickets]

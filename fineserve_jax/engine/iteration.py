"""Outputs of any number of prompts, as they come: few prompts are asked for ahead, and few outputs are kept."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from fineserve_jax.engine.intake import Intake, chat_encoder, prepare
from fineserve_jax.engine.outputs import RequestOutput, refused_output
from fineserve_jax.engine.prompts import encode_prompt, is_conversation
from fineserve_jax.engine.ticket_loop import TicketLoop
from fineserve_jax.engine.tickets import Inbox, Receiver, Ticket
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import ChatOptions
from fineserve_jax.request.request_options import RequestOptions, options_of_each
from fineserve_jax.request.sampling_params import SamplingParams

T = TypeVar("T")


class PromptSource:
    """Tickets for prompts out of an iterable, made one by one.

    Args: see `LLM.generate_iter`.

    Raises:
        RequestError: prompts that are no iterable; keywords that are none, or not one for all.
    """

    def __init__(
        self,
        engine: Intake,
        prompts: Iterable[Any],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
        options: RequestOptions | Iterable[RequestOptions] | None,
        chat_options: ChatOptions | None,
        fields: Mapping[str, Any],
    ) -> None:
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise RequestError(f"prompts is a {type(prompts).__name__}; give an iterable of prompts, or use generate()")
        if lists := [name for name, value in fields.items() if not isinstance(value, str | int | float | None)]:
            raise RequestError(f"{lists[0]} is no single value; give one for all prompts, or options for each of them")
        options_of_each(1, None, fields)
        self._engine, self._fields = engine, fields
        self._prompts = enumerate(prompts)
        self._sampling = _one_each(SamplingParams() if sampling_params is None else sampling_params, SamplingParams)
        self._options = _one_each(RequestOptions() if options is None else options, RequestOptions)
        self._encode_chat = chat_encoder(chat_options)

    def next(self, receiver: Receiver) -> Ticket | RequestOutput | None:
        """A ticket for the next prompt, or its output if it cannot be served; None: there are no more."""
        index, prompt = next(self._prompts, (0, self))
        if prompt is self:
            return None
        sampling = _next(self._sampling, SamplingParams, "sampling_params", index)
        options = _next(self._options, RequestOptions, "options", index)
        encode = self._encode_chat if is_conversation(prompt) else encode_prompt
        try:
            (options,) = options_of_each(1, options, self._fields)
            text, prepared = prepare(self._engine, prompt, encode, sampling, options)
        except RequestError as error:
            return refused_output(prompt if isinstance(prompt, str) else None, options, index, str(error))
        return Ticket(prepared, receiver, text, index)


def outputs_as_they_come(loop: TicketLoop, source: PromptSource, most: int, ordered: bool) -> Iterator[RequestOutput]:
    """The outputs of all prompts of a source, with at most so many asked for and not given out."""
    inbox, tickets, ready = Inbox(), list[Ticket](), deque[Ticket | RequestOutput]()
    early = dict[int, Ticket | RequestOutput]()  # those that are ready, and have to wait for others
    num_asked, next_index, num_given, has_more = 0, 0, 0, True
    loop.abort_with(inbox, tickets)
    try:
        while has_more or num_given < num_asked:
            # One for each output that was given out, and more only while there is nothing to give out.
            is_first = True
            while has_more and num_asked - num_given < most and (is_first or not (ready or inbox.has_news())):
                is_first, entry = False, source.next(inbox)
                has_more = entry is not None
                num_asked += has_more
                if isinstance(entry, Ticket):
                    tickets.append(entry)
                    loop.submit([entry])
                elif entry is not None:
                    ready.append(entry)
            if not ready and num_given < num_asked:
                ready.extend(inbox.wait())
            if ready:
                entry = ready.popleft()
                early[entry.index if ordered else next_index] = entry
                while next_index in early:
                    entry = early.pop(next_index)
                    next_index += 1
                    if isinstance(entry, Ticket):
                        tickets.remove(entry)
                    num_given += 1
                    yield entry.output() if isinstance(entry, Ticket) else entry
    finally:
        loop.abort(tickets)


def _one_each(value: T | Iterable[T], kind: type[T]) -> Iterator[T]:
    if isinstance(value, kind):
        return itertools.repeat(value)
    if not isinstance(value, Iterable):
        raise RequestError(f"a {type(value).__name__} is no {kind.__name__}; give one for all, or an iterable of them")
    return iter(value)


def _next(values: Iterator[T], kind: type[T], name: str, index: int) -> T:
    value = next(values, None)
    if not isinstance(value, kind):
        given = "no entry" if value is None else f"a {type(value).__name__}"
        raise RequestError(f"{name} has {given} for prompt {index}; give {kind.__name__}, one for all or one each")
    return value

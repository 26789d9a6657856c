"""Scores of completions that are given: what `LLM.score` asks of the engine, and what it tells.

prompt       |  t0  t1  t2  t3  t4 |          Full pages of the prompt are computed once and shared by all of its
completions                        | a b c    completions; the tokens behind its last full page, and before each
                                   | d e      completion, are computed with that.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.prompts import encode_prompt, one_or_several
from fineserve_jax.engine.tickets import Receiver, Ticket
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.request.request_options import RequestOptions, options_of_each
from fineserve_jax.request.sampling_params import SamplingParams

Completion = str | Iterable[int]
FOR_SCORES = SamplingParams(max_tokens=0, prompt_logprobs=0)


@dataclass(frozen=True, slots=True)
class CompletionScore:
    """What a model thinks of a completion.

    Attributes:
        token_ids: the completion.
        logprobs: of each of its tokens, natural, given the prompt and the tokens before it.
        is_greedy: of each, whether greedy sampling would have chosen it there.
        error: why there are no scores, or not of all tokens: the model computed NaN or infinity, or steps failed.
    """

    token_ids: list[int]
    logprobs: list[float]
    is_greedy: list[bool]
    error: str | None = None

    @property
    def total(self) -> float:
        """Log-probability of the whole completion; NaN where there is an error."""
        return math.fsum(self.logprobs) if self.error is None else math.nan

    @property
    def all_greedy(self) -> bool:
        """Whether greedy sampling would have given just this completion."""
        return self.error is None and all(self.is_greedy)


def completion_lists(prompts: Any, completions: Any) -> tuple[list[Any], list[list[Any]]]:
    """The prompts, and the completions of each.

    Args:
        prompts: see `LLM.score`.
        completions: of a single prompt its completions, of several a list of them for each.

    Raises:
        RequestError: completions that are no lists, or not one list for each prompt.
    """
    listed, is_single = one_or_several(prompts)
    of_each = [completions] if is_single else completions
    for given in (of_each, *(of_each if isinstance(of_each, list | tuple) else ())):
        if not isinstance(given, list | tuple):
            raise RequestError(
                f"completions has a {type(given).__name__} where a list is wanted; give a list of completions for a "
                "single prompt, and a list of such lists for several"
            )
    if len(of_each) != len(listed):
        raise RequestError(f"completions has {len(of_each)} lists for {len(listed)} prompts; give one for each")
    return listed, [list(own) for own in of_each]


def encode_completion(
    tokenizer: Tokenizer,
    text: str | None,
    prompt_ids: Sequence[int],
    completion: Completion,
    max_tokens: int | None = None,
) -> tuple[list[int], int]:
    """The tokens of a prompt and its completion, and index of the first that is scored.

    Of two texts, the tokens are those of the joined text, and a token that reaches across the joint is the
    completion's.

    Args:
        text, prompt_ids: the prompt, as `encode_prompt` gives it.
        max_tokens: see `Tokenizer.encode`.

    Raises:
        RequestError: a completion without tokens, or none of the prompt's before it.
    """
    if not isinstance(completion, str):
        token_ids = [*prompt_ids, *encode_prompt(tokenizer, completion)[1]]
    elif text is None:
        token_ids = [*prompt_ids, *tokenizer.encode(completion, add_special_tokens=False, max_tokens=max_tokens)]
    else:
        token_ids = tokenizer.encode(text + completion, max_tokens=max_tokens)
    pairs = enumerate(zip(prompt_ids, token_ids, strict=False))
    first = next((i for i, (own, joined) in pairs if own != joined), min(len(prompt_ids), len(token_ids)))
    if first == len(token_ids):
        raise RequestError("the completion is empty; give at least one token")
    if first == 0:
        raise RequestError(
            "no token of the prompt is left before those of the completion: the first is of both; give a longer "
            "prompt, or both as token ids"
        )
    return token_ids, first


@dataclass(frozen=True, slots=True)
class Scoring:
    """Scores of completions, see `LLM.score`; a `Call`.

    Attributes:
        prompts: one or more, in a list.
        completions: of each prompt.
        options, fields: as of `LLM.score`.
    """

    prompts: Sequence[Any]
    completions: Sequence[Sequence[Completion]]
    options: RequestOptions | Sequence[RequestOptions] | None
    fields: Mapping[str, Any]

    def tickets(self, engine: Engine, receiver: Receiver) -> list[Ticket]:
        """Those of all completions, prompt by prompt.

        Raises:
            RequestError: naming the first prompt and completion that cannot be scored.
        """
        option_list = options_of_each(len(self.prompts), self.options, self.fields)
        tickets = []
        for i, (prompt, own, wanted) in enumerate(zip(self.prompts, option_list, self.completions, strict=True)):
            where = f"prompt {i}"
            try:
                served = engine.served(own.model)
                text, prompt_ids = encode_prompt(served.tokenizer, prompt, served.max_seq_len)
                for j, completion in enumerate(wanted):
                    where = f"prompt {i}, completion {j}"
                    pair = encode_completion(served.tokenizer, text, prompt_ids, completion, served.max_seq_len)
                    tickets.append(_ticket(engine, receiver, *pair, own))
            except RequestError as error:
                raise RequestError(f"{where}: {error}") from None
        return tickets

    def result(self, tickets: Sequence[Ticket]) -> list[list[CompletionScore]]:
        """The scores of each prompt's completions."""
        found = iter(tickets)
        return [[_completion_score(next(found)) for _ in own] for own in self.completions]


def _ticket(
    engine: Engine, receiver: Receiver, token_ids: list[int], scored_from: int, options: RequestOptions
) -> Ticket:
    prepared = engine.prepare(token_ids, FOR_SCORES, options)
    return Ticket(replace(prepared, scored_from=scored_from), receiver)


def _completion_score(ticket: Ticket) -> CompletionScore:
    """What a ticket gave, which is done; raises its error if there is one."""
    ticket.output()
    (request,) = ticket.samples
    assert request.scores is not None, "a completion's ticket asks for them"
    entries, error = request.scores.entries, None if request.error is None else str(request.error)
    if error is None and request.scores.next < request.num_prompt_tokens:
        error = f"it ended before it was scored, with the reason {str(request.finish_reason)!r}"
    return CompletionScore(
        token_ids=request.token_ids[request.scores.first :],
        logprobs=[entry.logprob for entry in entries],
        is_greedy=[entry.is_greedy for entry in entries],
        error=error,
    )

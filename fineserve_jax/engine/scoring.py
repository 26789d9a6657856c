"""Scores of completions that are given: what `LLM.score` asks of the engine, and what it tells.

prompt       |  t0  t1  t2  t3  t4 |          The prompt is computed once, and its completions with its end, as branches
completions                        | a b c    that do not see each other: t4 a b d go through the model, and tell of
                                   | d e      a b c and d e.

Where the KV format encodes whole pages, or a completion has no room in a step, it is a request by itself, which shares
the full pages of the prompt.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fineserve_jax.engine.intake import Intake
from fineserve_jax.engine.nonfinite import nonfinite_message
from fineserve_jax.engine.prepare import PreparedRequest
from fineserve_jax.engine.prompts import encode_prompt, one_or_several
from fineserve_jax.engine.tickets import Receiver, Ticket
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.request.request import Request, TokenScore, num_branch_tokens
from fineserve_jax.request.request_options import RequestOptions, options_of_each
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.scoring import takes_branches

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

    def tickets(self, engine: Intake, receiver: Receiver) -> list[Ticket]:
        """Those of all completions, prompt by prompt.

        Raises:
            RequestError: naming the first prompt and completion that cannot be scored.
        """
        option_list = options_of_each(len(self.prompts), self.options, self.fields)
        tickets = []
        for i, (prompt, own, wanted) in enumerate(zip(self.prompts, option_list, self.completions, strict=True)):
            where, found = f"prompt {i}", []
            try:
                served = engine.served(own.model)
                text, prompt_ids = encode_prompt(served.tokenizer, prompt, served.max_seq_len)
                for j, completion in enumerate(wanted):
                    where = f"prompt {i}, completion {j}"
                    pair = encode_completion(served.tokenizer, text, prompt_ids, completion, served.max_seq_len)
                    found.append(_prepare(engine, *pair, own))
            except RequestError as error:
                raise RequestError(f"{where}: {error}") from None
            tickets += [Ticket(prepared, receiver) for prepared in _together(found)]
        return tickets

    def result(self, tickets: Sequence[Ticket]) -> list[list[CompletionScore]]:
        """The scores of each prompt's completions."""
        found = itertools.chain.from_iterable(map(_completion_scores, tickets))
        return [list(itertools.islice(found, len(own))) for own in self.completions]


def _prepare(engine: Intake, token_ids: list[int], scored_from: int, options: RequestOptions) -> PreparedRequest:
    """A completion by itself, checked."""
    return replace(engine.prepare(token_ids, FOR_SCORES, options), scored_from=scored_from)


def _together(found: Sequence[PreparedRequest]) -> Iterator[PreparedRequest]:
    """The completions of a prompt, in their order: neighbours that have the same tokens ahead of them as branches of
    these, as many as a step computes beside the last page of them, and others by themselves."""
    for _, group in itertools.groupby(found, _what_branches_share):
        first, *others = group
        prefix, branches = first.token_ids[: first.scored_from], list[tuple[int, ...]]()
        most = _most_branch_tokens(first)
        for prepared in (first, *others):
            branch = tuple(prepared.token_ids[len(prefix) :])
            if branches and num_branch_tokens([*branches, branch]) > most:
                yield _branched(first, prefix, branches)
                branches = []
            if num_branch_tokens([branch]) > most:
                yield prepared
            else:
                branches.append(branch)
        if branches:
            yield _branched(first, prefix, branches)


def _what_branches_share(prepared: PreparedRequest) -> tuple[int, list[int]]:
    """The tokens ahead of a completion, and the model of the engine that it was checked by."""
    return id(prepared.served), prepared.token_ids[: prepared.scored_from]


def _branched(prepared: PreparedRequest, prefix: list[int], branches: list[tuple[int, ...]]) -> PreparedRequest:
    return replace(prepared, token_ids=prefix, max_total_tokens=len(prefix), branches=tuple(branches))


def check_branches(prepared: PreparedRequest) -> None:
    """Raises `RequestError` if the engine that a request was prepared for takes fewer branches, or shorter ones."""
    if not prepared.branches:
        return
    num_tokens, most = num_branch_tokens(prepared.branches), _most_branch_tokens(prepared)
    if num_tokens > most:
        raise RequestError(
            f"the completions of a prompt have {num_tokens} tokens together, and a step computes {max(most, 0)} behind "
            "it; give fewer completions, or a larger max_chunk_tokens"
        )
    longest = len(prepared.token_ids) + max(map(len, prepared.branches))
    if longest > prepared.served.max_seq_len:
        raise RequestError(
            f"a prompt and its completion have {longest} tokens, and max_seq_len is {prepared.served.max_seq_len}; "
            "give fewer tokens, or a larger max_seq_len"
        )


def _most_branch_tokens(prepared: PreparedRequest) -> int:
    """How many tokens of branches a step computes behind a prompt; -1: it takes no branches, since they are not laid
    out in pages as the KV format has them, or for what `takes_branches` says."""
    served, config = prepared.served, prepared.served.config
    takes_any = config.chunked_prefill and takes_branches(served.model.config, config.reproducible, config.check_finite)
    kept = [get_format(name) for name in served.formats_of(prepared.precision.start)]
    if any(kv_format.residual for kv_format in kept) or not takes_any:
        return -1
    return config.max_chunk_tokens - served.geometry.page_size


def _completion_scores(ticket: Ticket) -> list[CompletionScore]:
    """What came of a ticket's completions, which are done; raises its error if there is one."""
    if ticket.error is not None:
        raise ticket.error
    (request,) = ticket.samples
    assert request.scores is not None, "a completion's ticket asks for them"
    completions = [list(branch) for branch in request.branches] or [request.token_ids[request.scores.first :]]
    entries = iter(request.scores.entries)
    return [_completion_score(request, own, list(itertools.islice(entries, len(own)))) for own in completions]


def _completion_score(request: Request, token_ids: list[int], entries: list[TokenScore]) -> CompletionScore:
    error = None if request.error is None else str(request.error)
    if error is None and len(entries) < len(token_ids):
        error = f"it ended before it was scored, with the reason {str(request.finish_reason)!r}"
    if error is None and not all(math.isfinite(entry.logprob) for entry in entries):
        error = nonfinite_message(request.model, 0, None)
    return CompletionScore(
        token_ids=token_ids,
        logprobs=[entry.logprob for entry in entries],
        is_greedy=[entry.is_greedy for entry in entries],
        error=error,
    )

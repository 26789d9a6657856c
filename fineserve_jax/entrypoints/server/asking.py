"""From the bytes of a body to tickets for the engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fineserve_jax.engine.async_loop import AsyncInbox
from fineserve_jax.engine.build import KnownModel
from fineserve_jax.engine.checks import most_prompt_tokens
from fineserve_jax.engine.intake import Intake
from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.entrypoints.openai_api.asked import Asked, SamplingDefaults, prompt_tokens, sort_fields
from fineserve_jax.entrypoints.openai_api.bodies import body_fields, prompts_of
from fineserve_jax.entrypoints.openai_api.fields import FieldError, Form
from fineserve_jax.entrypoints.openai_api.json_objects import decode_object
from fineserve_jax.entrypoints.server.classes import ServiceClass
from fineserve_jax.entrypoints.server.errors import ApiError
from fineserve_jax.errors import RequestError
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.validation import shown

MAX_SAMPLES = 128
"""Most samples of a request, those of all its prompts together."""


@dataclass(frozen=True, slots=True)
class Asking:
    """A request that the engine can answer.

    Attributes:
        receiver: who is told of its tickets, held here as long as they are waited for.
        tickets: one for each prompt.
        is_streamed: its answer is wanted as it comes.
        tells_usage: the stream is to end with the numbers of tokens.
        echoes: answers begin with their prompts.
        callable_names: functions that the model may call.
    """

    form: Form
    receiver: AsyncInbox
    tickets: list[Ticket]
    is_streamed: bool
    tells_usage: bool
    echoes: bool
    callable_names: tuple[str, ...]


def read_asking(
    engine: Intake,
    defaults: SamplingDefaults,
    receiver: AsyncInbox,
    form: Form,
    body: bytes,
    service_class: ServiceClass | None,
    own_templates: bool = False,
) -> Asking:
    """A request, checked by all that can be known before it waits. May be called by any thread.

    Args:
        defaults: how to sample where the request does not say.
        receiver: who is told of its tickets.
        form: of the endpoint.
        service_class: of who asks; None: there are no classes.
        own_templates: whether it may bring a chat template.

    Raises:
        RequestError: a body that cannot be read or honoured.
        ApiError: a model that is not served, or what the class does not allow.
    """
    given = decode_object(body, "the body", "invalid_json")
    is_streamed, tells_usage = _streaming(given)
    fields = body_fields(form, given)
    prompts = prompts_of(fields)
    contents = [fields] if prompts is None else [{**fields, "prompt": prompt} for prompt in prompts]
    if len(contents) > MAX_SAMPLES:
        raise RequestError(f"the request has {len(contents)} prompts; it may have {MAX_SAMPLES}")
    tickets = []
    for index, content in enumerate(contents):
        asked = Asked(form=form, **sort_fields(content, form))
        sampling = defaults.sampling(asked)
        if is_streamed and (asked.echo or sampling.prompt_logprobs is not None):
            what = "echo" if asked.echo else "prompt_logprobs"
            raise FieldError(f"{what} with stream is not served; leave one of them out", "unsupported_parameter")
        options = asked.options if service_class is None else service_class.apply(asked.options)
        token_ids = tokens_of(engine, asked, sampling, own_templates)
        prepared = engine.prepare(token_ids, sampling, options)
        text = asked.prompt if isinstance(asked.prompt, str) else None
        tickets.append(Ticket(prepared, receiver, text, index, wants_pieces=is_streamed))
    if (samples := sum(ticket.prepared.sampling.n for ticket in tickets)) > MAX_SAMPLES:
        raise RequestError(f"{len(tickets)} prompts with n samples each are {samples}; at most {MAX_SAMPLES} may be")
    return Asking(form, receiver, tickets, is_streamed, tells_usage, asked.echo, asked.chat.callable_names)


def tokens_of(engine: Intake, asked: Asked, sampling: SamplingParams, own_templates: bool) -> list[int]:
    """The prompt as token ids, to be answered so.

    Raises:
        RequestError: a prompt that cannot be read, or that has more tokens than its model can answer.
        ApiError: see `read_asking`.
    """
    check_model(dict(engine.models), asked.options.model)
    served, template = engine.served(asked.options.model), asked.chat.chat_template
    if template is not None and template not in served.tokenizer.chat_templates and not own_templates:
        known = ", ".join(sorted(served.tokenizer.chat_templates)) or "none"
        message = f"chat_template={shown(template)} is none of the model's, which are: {known}; leave it out"
        raise ApiError(f"{message}, or start the server with --own-chat-templates", "unsupported_parameter", 403)
    return prompt_tokens(asked, served.tokenizer, most_prompt_tokens(served.max_seq_len, sampling))


def check_model(models: Mapping[str, KnownModel], model: str | None) -> None:
    """Raises `ApiError` for a model that is not among those that are served; None: the only one is meant."""
    if model is not None and model not in models:
        known = ", ".join(models) or "none, until one is loaded"
        raise ApiError(f"model={shown(model)} is not served; choose one of {known}", "model_not_found", 404)


def _streaming(given: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the answer is streamed, and whether with its usage. Takes those fields out."""
    is_streamed, options = given.pop("stream", None), given.pop("stream_options", None)
    if not isinstance(is_streamed, bool | None):
        raise FieldError(f"stream={shown(is_streamed)} is neither true nor false; give one of them")
    if options is None:
        return bool(is_streamed), False
    if not is_streamed:
        raise FieldError("stream_options without stream say nothing; set stream to true, or leave them out")
    known = ("include_usage", "include_obfuscation")
    if not isinstance(options, Mapping) or any(name not in known for name in options):
        raise FieldError(f"stream_options={shown(options)} is not served; give an object with include_usage")
    wanted = options.get("include_usage")
    if not isinstance(wanted, bool | None):
        raise FieldError(f"stream_options.include_usage={shown(wanted)} is neither true nor false; give one of them")
    if options.get("include_obfuscation"):
        raise FieldError("stream_options.include_obfuscation is not served; leave it out", "unsupported_parameter")
    return True, bool(wanted)

"""Chat messages to the text a model was trained on, by the Jinja template that comes with its tokenizer."""

import functools
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from fineserve_jax.errors import FineServeError, RequestError
from fineserve_jax.loaders.chat_messages import check_messages, cut_after, with_parsed_arguments, with_text
from fineserve_jax.loaders.chat_templates import RENDERER
from fineserve_jax.loaders.tokenizer import Tokenizer
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.request.structured.params import StructuredOutputsParams
from fineserve_jax.request.structured.tool_calls import BEGIN, form_of_calls, function_names
from fineserve_jax.validation import Validated, given_values, refusal

Messages = Sequence[Mapping[str, Any]]
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


class ChatOptions(Validated):
    """How a conversation is rendered. Every field is checked on construction; a bad one raises `RequestError`.

    Attributes:
        tools: functions that the model may call, JSON schemas as OpenAI's API and transformers have them; None: none.
            Arguments of those that are `strict` are of their schema.
        tool_choice: "auto": the model may call some; "none": they are not shown to it; "required": it must call one;
            {"type": "function", "function": {"name": "f"}}: it must call this one.
        parallel_tool_calls: whether an answer may have several calls.
        documents: texts to answer from, for templates that know such; None: none.
        chat_template: name of one of the model's templates, or the source of another one; None: the template "tool_use"
            where there are tools and such a template, else the default.
        chat_template_kwargs: further values for the template, such as {"enable_thinking": False}.
        add_generation_prompt: end with the opening of the assistant's turn, so that the model answers; None: yes,
            unless the final message is to be continued.
        continue_final_message: end inside the final message, so that the model goes on with it.
    """

    error_class: ClassVar[type[FineServeError]] = RequestError

    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    _form_of_calls: StructuredOutputsParams | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _none_is_unset(cls, values: Any) -> Any:
        return given_values(values, cls.model_fields)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _none_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in RESERVED if name in value]:
            raise ValueError(f"{taken[0]!r} is set by other options; leave it out here")
        return value

    @model_validator(mode="after")
    def _answers_or_goes_on(self) -> Self:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError(
                "add_generation_prompt begins a new message, continue_final_message none; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _calls_can_be_kept_to(self) -> Self:
        if self.tool_choice != "none":
            try:
                form = form_of_calls(self.tools or (), self.tool_choice, self.parallel_tool_calls or not self.tools)
            except RequestError as error:
                raise refusal(str(error)) from None
            self._form_of_calls = form
        return self

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools, where the model may call them."""
        return None if self.tool_choice == "none" else self.tools

    @property
    def callable_names(self) -> tuple[str, ...]:
        """Names of the functions that the model may call."""
        return function_names(self.shown_tools or ())

    def constrained(self, sampling: SamplingParams) -> SamplingParams:
        """How to sample, so that what must be called is, and as it must be.

        Raises:
            RequestError: the text is to be something else, too.
        """
        if self._form_of_calls is None:
            return sampling
        if sampling.structured_outputs is not None:
            raise RequestError(
                "structured_outputs, or response_format, and tools whose calls are constrained (strict, "
                "parallel_tool_calls=false, or a tool_choice that demands one) both say what the text must be; give "
                "one of them"
            )
        return sampling.model_copy(update={"structured_outputs": self._form_of_calls})

    def check_form_of_calls(self, template: str, special_tokens: Container[str]) -> None:
        """Raises `RequestError` if calls are constrained, and a template's are not of the form that they would have."""
        if self._form_of_calls is None:
            return
        remedy = (
            "leave out strict, parallel_tool_calls and tool_choice, or ask for the arguments' JSON by "
            "structured_outputs"
        )
        if BEGIN not in template:
            raise RequestError(
                f"this model's chat template has no {BEGIN}, and calls can be constrained in that form only; {remedy}"
            )
        if BEGIN in special_tokens:
            raise RequestError(f"{BEGIN} is a special token of this model, which no text holds; {remedy}")

    @property
    def generates(self) -> bool:
        """Whether the text ends with the opening of the assistant's turn."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


PLAIN = ChatOptions()


def render_chat(tokenizer: Tokenizer, messages: Messages, options: ChatOptions = PLAIN) -> str:
    """Render messages such as `{"role": "user", "content": "Hi"}` with the tokenizer's chat template.

    Content may be text, a list of text parts as in OpenAI's API, or null beside `tool_calls`. The result holds its
    special tokens as text: encode it with `add_special_tokens=False`.

    Raises:
        RequestError: malformed messages, a model without a template, and whatever goes wrong in the template itself,
            which runs in a sandbox with bounds on time and memory.
    """
    check_messages(messages)
    template = _template(tokenizer, options)
    options.check_form_of_calls(template, tokenizer.special_ids)
    given = [dict(message) for message in messages]
    if any(isinstance(message.get("content"), list) for message in given) and not _takes_parts(template):
        given = [with_text(message) for message in given]
    values = {
        "tools": options.shown_tools,
        "documents": options.documents,
        "add_generation_prompt": options.generates,
        **tokenizer.special_tokens,
        **options.chat_template_kwargs,
    }
    text = _render(template, given, values)
    return cut_after(text, given[-1]) if options.continue_final_message else text


def encode_chat(
    tokenizer: Tokenizer, messages: Messages, options: ChatOptions = PLAIN, max_tokens: int | None = None
) -> tuple[str, list[int]]:
    """Messages as the text that `render_chat` makes of them, and its token ids. Raises RequestError as that does.

    max_tokens: see `Tokenizer.encode`.
    """
    text = render_chat(tokenizer, messages, options)
    return text, tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens)


# -- templates ---------------------------------------------------------------------------------------------------


def _template(tokenizer: Tokenizer, options: ChatOptions) -> str:
    """Source of the template to use."""
    wanted, others = options.chat_template, tokenizer.chat_templates
    names = ", ".join(sorted(others))
    if wanted is not None:
        if wanted not in others and "{" not in wanted:
            known = f"one of {names}, or " if others else ""
            raise RequestError(f"chat_template={wanted!r} is no template of this model; give {known}the source of one")
        return others.get(wanted, wanted)
    if options.shown_tools and "tool_use" in others:
        return others["tool_use"]
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if others:
        raise RequestError(
            f"this model has several chat templates, none is the default; they are {names}; name one as chat_template"
        )
    raise RequestError(
        "this model has no chat template, so messages cannot be rendered; give a plain prompt, or use an "
        "instruction-tuned model"
    )


def _render(template: str, messages: list[dict[str, Any]], values: dict[str, Any]) -> str:
    """Arguments of tool calls are objects to most templates and text to some: whichever renders."""
    parsed = [with_parsed_arguments(message) for message in messages]
    try:
        return RENDERER.render(template, {"messages": parsed, **values})
    except RequestError:
        if parsed == messages:
            raise
        return RENDERER.render(template, {"messages": messages, **values})


@functools.lru_cache(maxsize=32)
def _takes_parts(template: str) -> bool:
    """Whether the template knows content that is a list of parts, tried with a message of one."""
    probe, special = "a text to be found again", {"bos_token": "", "eos_token": ""}
    message = {"role": "user", "content": [{"type": "text", "text": probe}]}
    try:
        text = RENDERER.render(template, {"messages": [message], "add_generation_prompt": True, **special})
    except RequestError:
        return False
    return probe in text and f"{message['content']}" not in text

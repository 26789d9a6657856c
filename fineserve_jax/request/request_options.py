"""What a request asks of the engine, besides how to sample: who answers, in which KV precision, how soon."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, TypedDict, TypeVar

from pydantic import Field, InstanceOf, Strict, WrapValidator, model_validator

from fineserve_jax.errors import FineServeError, RequestError
from fineserve_jax.validation import Validated, given_values, refused_as

MAX_PRIORITY = 2**31 - 1


def _such_as(example: str) -> WrapValidator:
    return refused_as(f'{{field}}={{value}} is a JSON {{kind}}; give text such as "{example}"')


# InstanceOf: pydantic's own str refuses one with half of a surrogate pair, which a JSON string may hold.
Text = InstanceOf[str]
Target = Annotated[
    float,
    Strict(),
    Field(gt=0, allow_inf_nan=False),
    refused_as("{field}={shown} is no latency target; give seconds, more than 0, or none"),
]
Priority = Annotated[
    int,
    Strict(),
    Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY),
    refused_as(f"{{field}}={{shown}} is no priority; give a whole number, -{MAX_PRIORITY} to {MAX_PRIORITY}, or none"),
]
Drafts = Annotated[
    int,
    Strict(),
    Field(ge=0),
    refused_as("{field}={shown} is no number of drafts; give a whole number, 0 or more, or none"),
]
Switch = Annotated[bool, Strict(), refused_as("{field}={value} is neither true nor false; give one of them, or none")]


class RequestOptions(Validated):
    """Options of one request. Every field is checked on construction; a bad one raises `RequestError`.

    None unsets any of them. Whether the engine serves the model and the KV formats, it says when it prepares the
    request.

    Attributes:
        model: name of the model that answers; None for the only one.
        kv_precision: KV format, or "auto"; None for the model's own, which is the engine's unless it has another.
        min_kv_precision: KV format to which older tokens may be narrowed when memory is short; None for the engine's,
            if that has one. With "auto" the narrowest unless another is named.
        tenant: whose the request is: quotas, shares and expected lengths are kept by it; "": nobody's in particular.
        priority: requests with smaller numbers are admitted first, and preempted last.
        ttft_slo_s: target for the first token, in seconds from arrival; None: none.
        tpot_slo_s: target for each further token, in seconds; None: none.
        drop_when_late: end the request, with the finish reason "late", when its first token cannot be in time any more;
            otherwise it then waits behind those that still can be.
        deadline_s: end the request, with the finish reason "late" and what it has by then, so many seconds after its
            arrival; None: however long it takes.
        num_speculative_tokens: most tokens that it may be ahead in a step, see `EngineConfig`, and at most as many as
            the engine has; 0: none, None: as many as the engine has.
    """

    error_class: ClassVar[type[FineServeError]] = RequestError

    model: Annotated[Text | None, _such_as("smollm2-135m")] = None
    kv_precision: Annotated[Text | None, _such_as("int8")] = None
    min_kv_precision: Annotated[Text | None, _such_as("int4")] = None
    tenant: Annotated[Text, _such_as("alice")] = ""
    priority: Priority = 0
    ttft_slo_s: Target | None = None
    tpot_slo_s: Target | None = None
    drop_when_late: Switch = False
    deadline_s: Target | None = None
    num_speculative_tokens: Drafts | None = None

    @model_validator(mode="before")
    @classmethod
    def _none_is_unset(cls, values: Any) -> Any:
        return given_values(values, cls.model_fields)

    @model_validator(mode="after")
    def _late_needs_a_target(self) -> Self:
        if self.drop_when_late and self.ttft_slo_s is None:
            raise ValueError("drop_when_late without a ttft_slo_s drops nothing; give ttft_slo_s, in seconds")
        return self


class OptionKeywords(TypedDict, total=False):
    """The fields of `RequestOptions` as keywords of a call with several prompts: one for all, or one for each."""

    model: str | Sequence[str | None] | None
    kv_precision: str | Sequence[str | None] | None
    min_kv_precision: str | Sequence[str | None] | None
    tenant: str | Sequence[str | None] | None
    priority: int | Sequence[int | None] | None
    ttft_slo_s: float | Sequence[float | None] | None
    tpot_slo_s: float | Sequence[float | None] | None
    drop_when_late: bool | Sequence[bool | None] | None
    deadline_s: float | Sequence[float | None] | None
    num_speculative_tokens: int | Sequence[int | None] | None


def options_of_each(
    count: int, options: RequestOptions | Sequence[RequestOptions] | None, keywords: Mapping[str, Any]
) -> list[RequestOptions]:
    """The options of each of `count` prompts.

    Args:
        options: one for all or one for each; None: the defaults.
        keywords: `OptionKeywords`: fields that `options` leaves unset.

    Raises:
        RequestError: an unknown keyword, a field that is given both ways, a number of entries other than `count`, or a
            bad value, naming its prompt.
    """
    if unknown := [name for name in keywords if name not in RequestOptions.model_fields]:
        known = ", ".join(RequestOptions.model_fields)
        raise RequestError(f"unknown option {unknown[0]!r}; the options of a request are: {known}")
    bases = one_each(RequestOptions() if options is None else options, RequestOptions, count, "options")
    given = {name: value for name, value in keywords.items() if value is not None}
    columns = {name: _column(value, count, name) for name, value in given.items()}
    merged = []
    for i, base in enumerate(bases):
        try:
            merged.append(_merged(base, {name: column[i] for name, column in columns.items()}))
        except RequestError as error:
            raise RequestError(f"prompt {i}: {error}" if count > 1 else str(error)) from None
    return merged


T = TypeVar("T")


def one_each(value: T | Sequence[T], kind: type[T], count: int, name: str) -> list[T]:
    """`value` for each of `count` prompts: itself repeated, or its elements. Raises `RequestError`."""
    if isinstance(value, kind):
        return [value] * count
    values: list[Any] = _column(value, count, name)
    if wrong := [entry for entry in values if not isinstance(entry, kind)]:
        raise RequestError(f"{name} holds a {type(wrong[0]).__name__}; give {kind.__name__}, one for all or one each")
    return values


def _column(value: Any, count: int, name: str) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise RequestError(f"{name} has {len(values)} entries for {count} prompts; give one for all, or one each")
    return values


def _merged(base: RequestOptions, keywords: Mapping[str, Any]) -> RequestOptions:
    own = {name: value for name, value in keywords.items() if value is not None}
    if twice := base.model_fields_set & own.keys():
        raise RequestError(f"{min(twice)} is given in options and as a keyword; give it in one of them")
    return RequestOptions(**base.model_dump(exclude_unset=True), **own) if own else base

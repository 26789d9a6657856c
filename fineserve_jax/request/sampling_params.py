"""What a request asks of the sampler."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import BeforeValidator, Field, field_validator, model_validator

from fineserve_jax.errors import FineServeError, RequestError
from fineserve_jax.request.logits_processor import get_logits_processor
from fineserve_jax.request.structured.params import StructuredOutputsParams
from fineserve_jax.request.structured.response_format import structured_outputs_of
from fineserve_jax.validation import Validated, given_values, token_id

MAX_TOP_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 256
MAX_LOGITS_PROCESSORS = 8
MAX_SEED = 2**32 - 1
MAX_BIAS = 1e4
MIN_TEMPERATURE = 1e-6
OTHER_NAMES = ("max_completion_tokens", "top_logprobs", "response_format")
"""OpenAI's, for `max_tokens`, for the number in `logprobs` where that is true, and for `structured_outputs`; see
`own_fields`."""


def _token_id(value: Any) -> Any:
    return value if isinstance(value, str) else token_id(value)  # keys of JSON objects are text


TokenId = Annotated[int, BeforeValidator(_token_id), Field(ge=0)]


NUMBERS = (
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "n", "prompt_logprobs"),
)


class SamplingParams(Validated):
    """How the tokens of one request are chosen, and when it ends.

    Every field is checked on construction; a bad one raises `RequestError`. None stands for a field's default. The
    order of application is the usual one: `logits_processors`, penalties and `logit_bias` on the raw logits, then
    `temperature`, then `top_k`, `top_p` and `min_p`. OpenAI's `max_completion_tokens` is taken for `max_tokens`,
    `logprobs=True` with `top_logprobs=k` for `logprobs=k`, and `response_format` for `structured_outputs`.

    Attributes:
        max_tokens: most tokens to generate; None means up to the engine's `max_seq_len`. 0 generates none, for
            `prompt_logprobs` alone.
        min_tokens: end-of-sequence and `stop_token_ids` cannot be sampled before this many tokens, and `stop` counts
            only where it ends behind them.
        temperature: 0 is greedy (argmax); otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 or -1 keeps all. Tokens tied with the k-th are kept.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
        min_p: drop tokens less likely than this fraction of the most likely one; 0 drops none.
        repetition_penalty: divide positive and multiply negative logits of tokens already in prompt or output
            (CTRL, arXiv 1909.05858); 1 is off.
        presence_penalty: subtract this from the logits of tokens already in the output.
        frequency_penalty: subtract this times the count of the token in the output.
        logit_bias: token id -> value added to its logit, -inf to ban it; at most 256 tokens.
        seed: seed of this request's random numbers; None takes one from the engine's seed and the request's order.
        n: how many samples of the prompt to return; sample i uses `seed + i`.
        stop: strings that end the text (they are not part of it); those that are special tokens of the model, too.
        include_stop_str_in_output: the text includes the stop string that ended it.
        skip_special_tokens: special tokens have no text; False writes them out.
        stop_token_ids: tokens that end the output, besides the model's end-of-sequence tokens.
        ignore_eos: keep generating past the model's end-of-sequence tokens.
        logprobs: None for none; 0 for the sampled token's log-probability; k for the k most likely tokens' too.
            They are those of the model, before processors, penalties, bias, temperature and what `structured_outputs`
            excludes.
        logprob_token_ids: at most 128 tokens whose log-probabilities are given, too, wherever one is sampled.
        prompt_logprobs: as `logprobs`, of the prompt's tokens, each given those before it. They are computed with the
            prompt, which for that is not taken from the prefix cache.
        structured_outputs: what the text must be, e.g. JSON of a schema; see `StructuredOutputsParams`.
        logits_processors: names of at most 8 logits processors, applied in this order; or a table of the arguments of
            each. See `LogitsProcessor`.
    """

    error_class: ClassVar[type[FineServeError]] = RequestError

    max_tokens: int | None = Field(default=None, ge=0)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    top_k: int = Field(default=0, ge=-1, le=2**31 - 1)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[TokenId, float] = Field(default_factory=dict, max_length=MAX_LOGIT_BIAS)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    n: int = Field(default=1, ge=1, le=128)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    logprob_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=MAX_LOGPROB_TOKEN_IDS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    structured_outputs: StructuredOutputsParams | None = None
    logits_processors: dict[str, dict[str, Any]] = Field(default_factory=dict, max_length=MAX_LOGITS_PROCESSORS)

    @model_validator(mode="before")
    @classmethod
    def _as_given(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return given_values(own_fields(values), cls.model_fields)

    @field_validator(*NUMBERS, mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("a number is wanted, not true or false")
        return value

    @field_validator("top_k")
    @classmethod
    def _all_is_0(cls, value: int) -> int:
        return max(value, 0)

    @field_validator("logit_bias")
    @classmethod
    def _bias_in_range(cls, value: dict[int, float]) -> dict[int, float]:
        for token, bias in value.items():
            if not (abs(bias) <= MAX_BIAS or bias == -math.inf):
                raise ValueError(
                    f"the bias of token {token} is {bias}; use -{MAX_BIAS:g} to {MAX_BIAS:g}, or -inf to ban the token"
                )
        return value

    @field_validator("temperature")
    @classmethod
    def _not_all_but_zero(cls, value: float) -> float:
        if value > 0 and np.float32(value) < np.float32(MIN_TEMPERATURE):  # the sampler's precision
            raise ValueError(f"a temperature under {MIN_TEMPERATURE:g} is as good as 0; use 0, which is greedy")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop_string(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("a stop string must not be empty: it would end every text at once")
        return value

    @field_validator("logits_processors", mode="before")
    @classmethod
    def _names_or_a_table(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return {name: {} if arguments is None else arguments for name, arguments in value.items()}
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("give names of logits processors, or a table of the arguments of each")
        if len(set(names)) < len(names):
            raise ValueError("each logits processor can be named once")
        return {name: {} for name in names}

    @field_validator("logits_processors")
    @classmethod
    def _known_processors(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in value:
            get_logits_processor(name)
        return value

    @model_validator(mode="after")
    def _min_under_max(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower min_tokens"
            )
        return self

    @model_validator(mode="after")
    def _no_tokens_for_scores_alone(self) -> Self:
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError(
                "max_tokens=0 generates nothing, which is for prompt_logprobs alone; give max_tokens of at least 1, or "
                "prompt_logprobs"
            )
        if self.max_tokens == 0 and self.n > 1:
            raise ValueError(f"n={self.n} samples of max_tokens=0 are all empty; use n=1")
        return self

    @property
    def gives_logprobs(self) -> bool:
        """Whether something is to be told of each token that is sampled."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def own_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams` under their own names and in their own forms; values are not checked.

    Args:
        given: fields, with `OTHER_NAMES` among them, and `logprobs` perhaps true or false.

    Raises:
        RequestError: a field that is given twice, differently, or a `response_format` that is none.
    """
    fields = dict(given)
    if "max_completion_tokens" in fields:
        other, own = fields.pop("max_completion_tokens"), fields.get("max_tokens")
        if own is not None and other is not None and own != other:
            raise RequestError(f"max_completion_tokens={other!r} is not max_tokens={own!r}; give one of them")
        fields["max_tokens"] = other if own is None else own
    top, logprobs = fields.pop("top_logprobs", None), fields.get("logprobs")
    if isinstance(logprobs, bool):
        fields["logprobs"] = 0 if logprobs else None
    if top is not None:
        if type(top) is not int or not 0 <= top <= MAX_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs={top!r} is no whole number from 0 to {MAX_TOP_LOGPROBS}; give one")
        if logprobs is True:
            fields["logprobs"] = top
        elif top and not logprobs:
            raise RequestError(f"top_logprobs={top} without logprobs gives none; set logprobs to true")
        elif logprobs and logprobs != top:
            raise RequestError(f"top_logprobs={top} is not logprobs={logprobs!r}; give one number, or logprobs as true")
    if "response_format" in fields:
        wanted = structured_outputs_of(fields.pop("response_format"))
        if wanted is not None and fields.get("structured_outputs") is not None:
            raise RequestError(
                "response_format and structured_outputs both say what the text must be; give one of them"
            )
        fields["structured_outputs"] = fields.get("structured_outputs") if wanted is None else wanted
    return fields

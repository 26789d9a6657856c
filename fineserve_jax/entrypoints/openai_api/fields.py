"""What a request may say of itself, and how it may be wrong."""

from typing import Literal

from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import ChatOptions
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import OTHER_NAMES, SamplingParams

Form = Literal["plain", "chat", "completions"]
"""As what a request came and is answered: the project's own form, or that of one of OpenAI's endpoints."""

SAMPLING_FIELDS = {*SamplingParams.model_fields, *OTHER_NAMES}
OPTION_FIELDS, CHAT_FIELDS = {*RequestOptions.model_fields}, {*ChatOptions.model_fields}
FIELDS = (
    *("prompt", "messages", "echo"),
    *ChatOptions.model_fields,
    *RequestOptions.model_fields,
    *SamplingParams.model_fields,
    *OTHER_NAMES,
)


class FieldError(RequestError):
    """What is wrong with a request. `code`: for programs, such as "unsupported_parameter"."""

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code

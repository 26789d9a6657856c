"""What a row may hold, and how it may be wrong."""

from typing import Literal

from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import ChatOptions
from fineserve_jax.request_options import RequestOptions
from fineserve_jax.sampling_params import OTHER_NAMES, SamplingParams

Form = Literal["plain", "chat", "completions"]
"""As what a row came and is answered: the project's own, or a request of one of OpenAI's endpoints."""

SAMPLING_FIELDS = {*SamplingParams.model_fields, *OTHER_NAMES}
OPTION_FIELDS, CHAT_FIELDS = {*RequestOptions.model_fields}, {*ChatOptions.model_fields}
ROW_FIELDS = (
    *("id", "prompt", "messages", "echo"),
    *ChatOptions.model_fields,
    *RequestOptions.model_fields,
    *SamplingParams.model_fields,
    *OTHER_NAMES,
)


class RowError(RequestError):
    """What is wrong with a row. `code`: for programs, see `BadRow`."""

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code

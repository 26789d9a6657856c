"""Errors as clients see them: OpenAI's shape, and a status."""

from collections.abc import Mapping

from fineserve_jax.entrypoints.openai_api.answers import STATUS, error_body
from fineserve_jax.errors import DeadEndError, EngineError, FineServeError, NonFiniteError, RequestError
from fineserve_jax.validation import shortened


class ApiError(FineServeError):
    """What cannot be answered.

    Args:
        message: what is wrong, for people.
        code: for programs.
        status: HTTP's.
        headers: further ones of the answer.
    """

    def __init__(self, message: str, code: str, status: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.headers = code, status, dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """{"error": ...}"""
        return error_body(str(self), self.code, self.status)


CODES: dict[type[BaseException], str] = {NonFiniteError: "not_finite", DeadEndError: "dead_end"}


def api_error(error: BaseException) -> ApiError:
    """Any error as a client sees it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        code = getattr(error, "code", "invalid_request")
        return ApiError(str(error), code, STATUS.get(code, 400))
    if isinstance(error, EngineError):
        return ApiError(str(error), "engine_fault", 503 if error.__cause__ is None else 500)
    if isinstance(error, FineServeError):
        code = CODES.get(type(error), "internal_error")
        return ApiError(str(error), code, STATUS.get(code, 500))
    message = f"{type(error).__name__}: {shortened(str(error))}; this is a fault of fineserve-jax, please report it"
    return ApiError(message, "internal_error", 500)

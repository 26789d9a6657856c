"""What a request asks of the engine, besides how to sample: who answers, in which KV precision, how soon."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from fineserve_jax.errors import FineServeError, RequestError
from fineserve_jax.validation import Validated


class RequestOptions(Validated):
    """Options of one request. Every field is checked on construction; a bad one raises `RequestError`.

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
    """

    error_class: ClassVar[type[FineServeError]] = RequestError

    model: str | None = None
    kv_precision: str | None = None
    min_kv_precision: str | None = None
    tenant: str = ""
    priority: int = Field(default=0, ge=-(2**31), le=2**31 - 1)
    ttft_slo_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tpot_slo_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    drop_when_late: bool = False

    @model_validator(mode="after")
    def _late_needs_a_target(self) -> Self:
        if self.drop_when_late and self.ttft_slo_s is None:
            raise ValueError("drop_when_late without a ttft_slo_s drops nothing; give ttft_slo_s, in seconds")
        return self

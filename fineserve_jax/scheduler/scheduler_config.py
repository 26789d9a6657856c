"""What a user may set of the scheduler."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.quotas import Quota
from fineserve_jax.scheduler.policies import find_policy
from fineserve_jax.scheduler.tenants import FairShares
from fineserve_jax.validation import Validated


class SchedulerConfig(Validated):
    """Settings of both levels.

    Attributes:
        policy: order of admission: fineserve, fcfs, sjf, edf, least_slack, tenants, or a function of yours, named as
            module:function or offered by an installed package.
        max_batch_size: most requests that hold memory at once and are computed together, those of all models counted.
        max_chunk_tokens: most prefill tokens of a step, each chunk counted in whole pages: a multiple of page_size.
            Longer prompts are computed in chunks.
        chunked_prefill: False computes every prompt in one piece.
        reproducible: give a request the same tokens and log-probabilities, bit for bit, whatever it is computed with,
            in whatever order, preempted or not, on one machine with the same settings. Costs time: a step computes one
            chunk or decodes, never both, and is always as large; time-per-token targets do not hold prefill back.
        page_size: tokens of a KV page; chunks begin at multiples of it.
        ageing_s: with policy "fineserve" or "fcfs", nobody is overtaken by a request that arrived this many seconds
            later and is no more urgent; with "edf", the deadline of requests that name none.
        slo_aware: whether targets steer more than the order of admission: requests that can no longer make their
            first token come last in their priority (or are dropped, if they ask for it), prefill makes way for
            time-per-token targets, and the model whose requests are due soonest has the next step. False: models take
            turns.
        overtaking_limit_s: whatever the priority, the policy and the targets, no request is overtaken by one that
            arrived this many seconds later.
        tenant_weights: with policy "tenants", the weight of each; 1 for those not named.
        preemption: how requests come back that lost their memory: "recompute", "swap" (from host memory, as far as that
            has room), or "auto", whichever is predicted to be faster.
        narrow_keep_pages: newest full pages of a request that are never narrowed.
        growth_reserve_pages: free pages that admission leaves for each running request that can still grow.
        quotas: shares of the KV memory that a tenant's requests or those in a KV precision are guaranteed, and that
            they may take at most: {"tenant:alice": {"guaranteed": 0.3, "max": 0.6}, "precision:int8": {"max": 0.5}}.
            Others use what is guaranteed and not wanted.

    Raises:
        ConfigError: a value out of range, an unknown policy, or a chunk that is not a whole number of pages.
    """

    policy: str = "fineserve"
    max_batch_size: int = Field(default=32, ge=1)
    max_chunk_tokens: int = Field(default=256, ge=1)
    chunked_prefill: bool = True
    reproducible: bool = False
    page_size: int = Field(default=16, ge=2)  # a chunk of one token is a decode
    ageing_s: float = Field(default=30.0, ge=0.0, allow_inf_nan=False)
    slo_aware: bool = True
    overtaking_limit_s: float = Field(default=600.0, ge=0.0, allow_inf_nan=False)
    tenant_weights: dict[str, float] | None = None
    preemption: Literal["auto", "recompute", "swap"] = "auto"
    narrow_keep_pages: int = Field(default=2, ge=0)
    growth_reserve_pages: int = Field(default=1, ge=0)
    quotas: dict[str, Quota] = Field(default_factory=dict)

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        try:
            find_policy(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("tenant_weights")
    @classmethod
    def _positive_weights(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        try:
            FairShares(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _chunks_are_the_same(self) -> Self:
        if self.reproducible and not self.chunked_prefill:
            raise ValueError(
                "reproducible with chunked_prefill=False: prompts are always cut at multiples of max_chunk_tokens; "
                "leave chunked_prefill out, and raise max_chunk_tokens for larger pieces"
            )
        return self

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        if self.max_chunk_tokens % self.page_size:
            nearest = -(-self.max_chunk_tokens // self.page_size) * self.page_size
            raise ValueError(
                f"max_chunk_tokens={self.max_chunk_tokens} is not a multiple of page_size={self.page_size}; "
                f"use {nearest}"
            )
        return self

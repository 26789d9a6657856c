"""How long answers turn out, learnt while serving: by tenant, with a prior.

    estimate(tenant) = (PRIOR * everyone's mean + tenant's sum) / (PRIOR + tenant's count)

so a tenant nobody knows is expected to be like everyone, and everyone, before anything has ended, like half of what
the first request allows itself. Sums and counts fade, so that the estimate follows a tenant that changes.
"""

from dataclasses import dataclass, field

from fineserve_jax.request.request import Request

PRIOR = 8.0
"""Answers that the prior counts as."""

FADING = 0.98
"""Weight of an answer falls by this factor with each later one of its tenant: a memory of some 50."""


@dataclass(slots=True)
class _Mean:
    """A fading sum of lengths, and the fading count of them."""

    total: float = 0.0
    count: float = 0.0

    def add(self, length: int) -> None:
        self.total = FADING * self.total + length
        self.count = FADING * self.count + 1.0

    def towards(self, prior: float) -> float:
        return (PRIOR * prior + self.total) / (PRIOR + self.count)


@dataclass(slots=True)
class OutputLengths:
    """Expected output lengths, in tokens."""

    _all: _Mean = field(default_factory=_Mean)
    _by_tenant: dict[str, _Mean] = field(default_factory=dict)

    def observe(self, request: Request) -> None:
        """Learn from a request that has ended by itself."""
        self._all.add(request.num_output_tokens)
        self._by_tenant.setdefault(request.options.tenant, _Mean()).add(request.num_output_tokens)

    def expected(self, request: Request) -> float:
        """Output tokens to expect of a request in all: no more than it allows itself, no fewer than it has."""
        most = request.max_total_tokens - request.num_prompt_tokens
        return float(min(most, max(request.num_output_tokens, self.of_tenant(request.options.tenant, most))))

    def of_tenant(self, tenant: str, most: int) -> float:
        """Output tokens to expect of a request of a tenant that allows itself so many at most; at least 1."""
        everyone = self._all.towards(most / 2)
        known = self._by_tenant.get(tenant)
        return min(float(most), max(1.0, everyone if known is None else known.towards(everyone)))

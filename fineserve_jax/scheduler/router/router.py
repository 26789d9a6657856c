"""The router: remembers what it sent where, asks replicas for their outlook, and chooses."""

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fineserve_jax.errors import ModelNotServedError
from fineserve_jax.kv.prefix_cache import hash_blocks
from fineserve_jax.scheduler.router.choice import Outlook, choose
from fineserve_jax.scheduler.router.prefixes import SentPrefixes

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the router sees it.

    Attributes:
        model, kv_precision: whose prefixes it may share.
        token_ids: the prompt.
        most_output_tokens: that it allows itself.
        tenant, priority, ttft_slo_s, tpot_slo_s: see `RequestOptions`.
    """

    model: str
    kv_precision: str
    token_ids: Sequence[int]
    most_output_tokens: int
    tenant: str = ""
    priority: int = 0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None


class Replica(Protocol):
    """An engine that serves some models.

    Attributes:
        models: names.
        most_blocks: pages of `BLOCK_TOKENS` tokens that its memory holds at most.
    """

    @property
    def models(self) -> Collection[str]: ...

    @property
    def most_blocks(self) -> int: ...

    def outlook(self, asked: Asked, cached_tokens: int) -> Outlook:
        """What it is predicted to give a request that it is sent now, of whose prompt so many tokens are cached."""

    def output_tokens(self, asked: Asked) -> float:
        """Tokens that are expected of the answer."""


class Router:
    """Sends requests to replicas. Any thread may call it.

    Args:
        replicas: by name.
    """

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        self._replicas = dict(replicas)
        self._sent = {name: SentPrefixes(replica.most_blocks) for name, replica in self._replicas.items()}
        self._lock = threading.Lock()

    def route(self, asked: Asked, among: Iterable[str] | None = None) -> str:
        """The name of the replica that the request is to be sent to, which is taken to be done.

        Args:
            among: the replicas to choose from; None: all.

        Raises:
            ModelNotServedError: none of them serves the model.
        """
        names = [name for name in among or self._replicas if asked.model in self._replicas[name].models]
        if not names:
            raise ModelNotServedError(f"model={asked.model!r} is served by no replica")
        blocks = block_hashes(asked)
        with self._lock:
            outlooks = [
                self._replicas[name].outlook(asked, self._sent[name].num_known(blocks) * BLOCK_TOKENS) for name in names
            ]
            expected = self._replicas[names[0]].output_tokens(asked)
            chosen = names[choose(outlooks, expected, asked.ttft_slo_s, asked.tpot_slo_s)]
            self._sent[chosen].note(blocks)
        return chosen

    def cached_tokens(self, name: str, asked: Asked) -> int:
        """Tokens of the prompt that the replica is expected to have cached."""
        with self._lock:
            return self._sent[name].num_known(block_hashes(asked)) * BLOCK_TOKENS

    def forget(self, name: str) -> None:
        """The replica was replaced, or what it had cached is gone."""
        with self._lock:
            self._sent[name] = SentPrefixes(self._replicas[name].most_blocks)


def block_hashes(asked: Asked) -> list[bytes]:
    """Of the blocks of a prompt that may be shared: its last token is computed in any case."""
    root, stop = f"{asked.model}/{asked.kv_precision}".encode(), (len(asked.token_ids) - 1) // BLOCK_TOKENS
    return [found for found, _ in hash_blocks(asked.token_ids, BLOCK_TOKENS, root, 0, stop)]

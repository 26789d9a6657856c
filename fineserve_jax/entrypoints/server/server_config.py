"""What a user may set of the server, besides the engine behind it."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from fineserve_jax.loaders.pooling_settings import Pooling
from fineserve_jax.validation import Validated


class ServerConfig(Validated):
    """Where the server listens, and what it bears.

    Attributes:
        host: address to listen at; by default nobody but this machine reaches it.
        port: to listen at; 0 takes any that is free.
        classes: YAML file with classes of service and their API keys; None: whoever reaches the server is served.
        max_wait_s: predicted seconds of waiting for memory from which on requests are refused with 429.
        max_waiting: most requests that wait for memory; further ones are refused with 429.
        max_connections: most connections; further ones are refused with 503.
        max_body_bytes: longest body of a request.
        read_timeout_s: seconds within which a body must have come.
        stall_timeout_s: seconds after which a client that takes nothing of its answer is given up, and its requests
            with it.
        embedding_pooling: how /v1/embeddings pools hidden states, "mean" or "last", for requests that do not say;
            none: as a model's files say, and refused where they do not, since language models are made for neither.
        own_chat_templates: requests may bring the source of a chat template; others wait while one is rendered, which
            is ended after 10 s.
        warm_up: compile at the start what requests need that name no KV precision, or one that a class names, and let
            nobody in before; without, the first requests wait for that.
        drain_s: seconds that requests have to end when the server is asked to, by SIGTERM or SIGINT.
    """

    MAX_HEADER_BYTES: ClassVar[int] = 32 * 1024

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    classes: Path | None = None
    max_wait_s: float = Field(default=60.0, gt=0)
    max_waiting: int = Field(default=1024, ge=1)
    max_connections: int = Field(default=2048, ge=1)
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    read_timeout_s: float = Field(default=30.0, gt=0)
    stall_timeout_s: float = Field(default=60.0, gt=0)
    embedding_pooling: Pooling | None = None
    own_chat_templates: bool = False
    warm_up: bool = True
    drain_s: float = Field(default=60.0, ge=0)

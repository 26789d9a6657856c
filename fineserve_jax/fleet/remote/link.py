"""How an engine in another process is reached."""

from typing import Any, Protocol


class LinkLostError(Exception):
    """The engine does not answer any more: it has died, or cannot be reached."""


class EngineLink(Protocol):
    """Reaches an `EngineHost`, and the one that replaces it when it has died. Any thread may call it."""

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the host returns; raises what it raises.

        Raises:
            LinkLostError: nobody knows what has become of the call.
        """

    def close(self) -> None:
        """Ends the host's process, and replaces it no more."""

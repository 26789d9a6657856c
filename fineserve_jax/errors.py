"""The errors a user can cause. Each message names the value, the limit and the remedy."""


class FineServeError(Exception):
    """Base of every error that is the caller's to mend; the command line prints it without a traceback."""


class ConfigError(FineServeError, ValueError):
    """An engine option that cannot be honoured."""


class EngineError(FineServeError):
    """An engine that is closed, that belongs to another process, or that has failed: `__cause__` is what made it."""


class ModelLoadError(FineServeError):
    """A model, tokenizer or checkpoint that cannot be found, read or used."""


class DeadEndError(FineServeError):
    """An answer that cannot go on as its structured outputs ask."""


class NonFiniteError(FineServeError):
    """NaN or infinity where a model should have computed a number."""


class RequestError(FineServeError, ValueError):
    """A request that can never be served: bad sampling values, an empty or too long prompt."""


class ModelNotServedError(RequestError):
    """A request for a model that is not, or no longer, served."""

    code = "model_not_found"

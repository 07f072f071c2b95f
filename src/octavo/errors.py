"""Errors a user can act on. `str(error)` is one line that says what is wrong and what would be right."""


class OctavoError(Exception):
    """Base of every error that Octavo raises on purpose. On the command line: one line, exit code 2."""


class ConfigError(OctavoError, ValueError):
    """A setting of the engine, the server or the command line that cannot work."""


class ModelNotFound(OctavoError, FileNotFoundError):
    """The model name is no directory, no .gguf file, no alias and no hub repository at hand."""


class UnsupportedModel(OctavoError, ValueError):
    """A well-formed model of an architecture, variant or tensor format that Octavo does not run."""


class DamagedWeights(OctavoError, ValueError):
    """A weight file that is truncated, inconsistent or not what its name says."""


class OutOfMemory(OctavoError, MemoryError):
    """The weights or the KV pool do not fit in the memory at hand."""


class InvalidRequest(OctavoError, ValueError):
    """A request that can never be served (HTTP 400). `param` names the field at fault, if one is."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for a single new token in the model's context."""


class InvalidKVState(InvalidRequest):
    """A KV state that is damaged, dropped or expired, or of another model, recipe or tenant."""

    def __init__(self, message: str):
        super().__init__(message, "kv_cache_state")


class QuotaExceeded(OctavoError, RuntimeError):
    """A KV state that would be more than its tenant may hold (HTTP 429)."""


class QueueFull(OctavoError, RuntimeError):
    """The server has as many requests as it takes (HTTP 503). `retry_after`: seconds until there should be room."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class RequestTimeout(OctavoError, TimeoutError):
    """A request that did not end within its timeout (HTTP 504)."""


class RequestFailed(OctavoError, RuntimeError):
    """A sound request that the engine could not go on with (HTTP 500)."""


class EngineDead(OctavoError, RuntimeError):
    """The engine stopped and could not be brought back."""


def shortened(value: object, limit: int = 200) -> str:
    """Return `value` as text on one line for an error message, its middle left out beyond `limit` characters."""
    text = " ".join(str(value).split())
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"

"""Errors that a user can act on. `str(error)` is one line that says what is wrong and what would be right."""


class OctavoError(Exception):
    """Base class of every error that Octavo raises on purpose.

    The command line prints the message and exits with code 2, or with 1 for EngineDead.
    """


class ConfigError(OctavoError, ValueError):
    """An unknown or invalid setting of the engine, the server or the command line."""


class ModelNotFound(OctavoError, FileNotFoundError):
    """A model name that is neither a directory, a .gguf file, an alias nor a hub repository."""


class UnsupportedModel(OctavoError, ValueError):
    """A well-formed model of an architecture, variant or tensor format that Octavo does not run."""


class DamagedWeights(OctavoError, ValueError):
    """A weight file that is truncated, inconsistent or not in the format that its name indicates."""


class OutOfMemory(OctavoError, MemoryError):
    """Weights or a KV cache that do not fit in the available memory."""


class InvalidRequest(OctavoError, ValueError):
    """A request that can never be served (HTTP 400).

    Args:
        message: One line for the user.
        param: The name of the field at fault, if there is one.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class UnknownModel(InvalidRequest):
    """A request for a model that the server does not have (HTTP 404)."""


class ModelBusy(OctavoError, RuntimeError):
    """A change of a model while another change of it is under way (HTTP 409)."""


class PromptTooLong(InvalidRequest):
    """A prompt that fills the model's context and leaves no space for an output token."""


class InvalidKVState(InvalidRequest):
    """A KV state that is damaged, dropped or expired, or that belongs to another model, quantization or tenant."""

    def __init__(self, message: str):
        super().__init__(message, "kv_cache_state")


class QuotaExceeded(OctavoError, RuntimeError):
    """A KV state that would exceed its tenant's quota of tokens (HTTP 429)."""


class QueueFull(OctavoError, RuntimeError):
    """A request that was refused because the server's queue is full (HTTP 503).

    Args:
        message: One line for the user.
        retry_after: Seconds after which a retry should be admitted.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type["QueueFull"], tuple[object, ...], dict[str, object]]:
        # By default, pickle would call the constructor with only the message.
        return type(self), (*self.args, self.retry_after), self.__dict__


class RequestTimeout(OctavoError, TimeoutError):
    """A request that did not finish within its timeout (HTTP 504)."""


class RequestFailed(OctavoError, RuntimeError):
    """A valid request that the engine could not finish because of an internal fault (HTTP 500)."""


class EngineDead(OctavoError, RuntimeError):
    """The engine has stopped, is not ready, or belongs to another process or event loop (HTTP 503)."""


def shortened(value: object, limit: int = 200) -> str:
    """Return `value` as one line for an error message. Text longer than `limit` characters loses its middle."""
    text = " ".join(str(value).split())
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def to_line(error: BaseException) -> tuple[str, str]:
    """Return the name of an error's class and its message in one line, for another process.

    An error of another module becomes EngineDead, with its name in the message.
    """
    name, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, OctavoError) and name in globals():
        return name, text
    return EngineDead.__name__, f"{name}: {text}" if text else name


def from_line(name: str, text: str) -> Exception:
    """Return the error that `to_line` has described."""
    error = globals().get(name, EngineDead)(text)
    assert isinstance(error, Exception)
    return error

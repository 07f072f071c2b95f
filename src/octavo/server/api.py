"""Api: the objects that all routes share."""

from collections.abc import Callable
from dataclasses import dataclass

from octavo.async_llm import AsyncLLM

from .config import ServerConfig
from .edge.body import BodyReader
from .errors import ApiError


@dataclass(frozen=True)
class Api:
    """A started `llm` with the server's settings.

    Args:
        started: Unix time at which the server started, in seconds.
        draining: returns whether the server is shutting down.
    """

    llm: AsyncLLM
    config: ServerConfig
    bodies: BodyReader
    started: int
    draining: Callable[[], bool]

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 unless `name` is the served model. None stands for the served model."""
        served = self.llm.config.model_name
        if name is not None and name != served:
            raise ApiError(404, f"the model {name!r} is not served here; {served!r} is", "model", "model_not_found")

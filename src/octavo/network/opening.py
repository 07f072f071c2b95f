"""What AsyncLLM needs for a model whose engines others run."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial

from octavo.config import EngineConfig
from octavo.curve import Curve
from octavo.frontend.frontend import Frontend
from octavo.process_guard import hide_memory

from .discovery import FoundModel, find_model
from .followed import FollowedEngines
from .model_files import ModelFiles

log = logging.getLogger("octavo")


def open_engines(
    config: EngineConfig, found: FoundModel | None
) -> tuple[EngineConfig, ModelFiles, Callable[[Frontend], FollowedEngines]]:
    """Return the settings with what the engines have decided, the model's files, and what makes a frontend use them.

    Args:
        found: what the engines serve; if it is None, wait for one of them.

    Raises ConfigError if all engines refuse.
    """
    addresses, curve = config.engine_addresses, Curve.read(config.secret_file)
    if curve is not None:
        hide_memory()
    found = found or find_model(addresses, curve, partial(log.warning, "waiting for an engine: %s"))
    digest, name, batch = found.files.digest, config.served_model_name or found.name, found.batch

    def follow(frontend: Frontend) -> FollowedEngines:
        return FollowedEngines(frontend, addresses, curve, digest)

    size, tokens = (
        batch.get("max_batch_size", config.max_batch_size),
        batch.get("max_batch_tokens", config.max_batch_tokens),
    )
    config = dataclasses.replace(config, served_model_name=name, max_batch_size=size, max_batch_tokens=tokens)
    return config, found.files, follow

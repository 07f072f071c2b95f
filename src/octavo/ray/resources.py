"""What an engine asks Ray for."""

from typing import Any

from octavo.config import EngineConfig


def engine_options(config: EngineConfig) -> dict[str, Any]:
    """Return the options of an engine's actor: CPUs, and GPUs if it runs on some. Ray shows it no other GPUs."""
    options: dict[str, Any] = {"num_cpus": config.threads or 1}
    return options | ({"num_gpus": config.tensor_parallel_size} if config.backend_name == "cuda" else {})

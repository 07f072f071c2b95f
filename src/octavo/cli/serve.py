"""octavo serve: an OpenAI-compatible HTTP server."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.server.config import ServerConfig
from octavo.settings import Resolved, settings_of

from .flags import Command, settings_flags

if TYPE_CHECKING:
    from octavo.fleet.specs import FleetSpec


def register(app: typer.Typer) -> None:
    app.command(cls=Command)(serve)


@settings_flags(EngineConfig, ServerConfig, model_argument=False)
def serve(
    settings: Resolved,
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="One model or several: Hugging Face directories, .gguf files, hub names, or the alias smollm2.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve one model or several over HTTP with OpenAI's API.

    Every setting is also a key of a --config file and an environment variable OCTAVO_...; see octavo config. vLLM's
    flags are accepted too.
    """
    if (key := os.environ.get("VLLM_API_KEY")) and "api_key" not in settings.values:
        settings.values["api_key"] = [key]
    server = settings.build(ServerConfig)
    names = list(given or ())
    flag = [settings.values["model"]] if settings.origins.get("model", "").startswith("flag") else []
    if names and flag and names != flag:
        raise ConfigError(f"two models are given, {names[0]} and --model {flag[0]}; leave one out")
    if server.models is not None and (names or flag):
        raise ConfigError(f"two kinds of models are given, {(names or flag)[0]} and --models; leave one out")
    if (urls := settings.values.get("engines")) and server.models is None:
        if names or flag:
            raise ConfigError("with --engines, the engines say which model they serve; leave the model out")
        settings.values["model"] = urls if isinstance(urls, str) else ",".join(urls)
    if len(names) == 1:
        settings.values["model"] = names[0]
    _follow_torchrun(settings.values)
    engine = settings.build(EngineConfig)
    _check_torchrun(engine.tensor_parallel_size)
    is_fleet = len(names) > 1 or server.models is not None or server.memory is not None
    if is_fleet and engine.nnodes > 1:
        raise ConfigError("nnodes must be 1 with several models, --models or --memory; start a server for each model")
    if engine.node_rank > 0:
        from .node import run_node

        run_node(engine)
        return
    from octavo.server.run import serve as run

    run((lambda: _fleet(settings, server, names or [engine.model])) if is_fleet else engine, server)


def _follow_torchrun(values: dict[str, Any]) -> None:
    """Set what is not set and follows from torchrun's variables, if it has started processes on several machines."""
    variables = os.environ
    if "TORCHELASTIC_RUN_ID" not in variables or "GROUP_WORLD_SIZE" not in variables:
        return
    if (nodes := int(variables["GROUP_WORLD_SIZE"])) > 1:
        values.setdefault("nnodes", nodes)
        values.setdefault("node_rank", int(variables["GROUP_RANK"]))
        values.setdefault("master_addr", variables["MASTER_ADDR"])
        values.setdefault("master_port", int(variables["MASTER_PORT"]) + 1)  # torchrun itself listens on MASTER_PORT


def _check_torchrun(ranks: int) -> None:
    """Raise ConfigError if torchrun has started this process as one of another number than `ranks`."""
    if "TORCHELASTIC_RUN_ID" in os.environ and (world := os.environ.get("WORLD_SIZE", "1")) != str(ranks):
        raise ConfigError(
            f"torchrun has started {world} processes (--nnodes times --nproc_per_node) and tensor_parallel_size is "
            f"{ranks}; give both the same number"
        )


def _fleet(settings: Resolved, server: ServerConfig, names: Sequence[str]) -> "FleetSpec":
    """Return the description of several models; `settings` apply to all of them."""
    from octavo.fleet.specs import FleetSpec, model_spec, read_models
    from octavo.machine import available_memory

    common: dict[str, Any] = {
        name: value for name, value in settings.values.items() if name in settings_of(EngineConfig)
    }
    if server.models is not None:
        spec = read_models(Path(server.models), common)
    elif len(names) > 1 and "served_model_name" in common:
        raise ConfigError("served_model_name is for one model; name several in a file, for --models")
    else:
        alone = common.pop("served_model_name", None)
        spec = FleetSpec([model_spec(alone or name, {"model": name}, common) for name in names])
    memory = server.memory or spec.memory or available_memory()
    return FleetSpec(spec.models, spec.splits, memory)

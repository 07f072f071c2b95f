"""The engine's settings as flags of a command: one for each field of EngineConfig."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from octavo.config import EngineConfig
from octavo.errors import ConfigError

from .expand import expand, flag

Result = TypeVar("Result")
_PANEL = "Engine"


def engine_flags(command: Callable[..., Result], model_argument: bool = True) -> Callable[..., Result]:
    """Replace the parameter `config: EngineConfig` of a typer command by an argument MODEL and a flag for every field.

    Of flags, --config FILE, OCTAVO_* variables and defaults, the first that sets a field wins.
    Without `model_argument`, --model is the only way to name one.
    """
    hints = get_type_hints(EngineConfig)
    flags = [_model_argument()] if model_argument else []
    flags.append(
        flag("config_file", Path, "Settings in YAML, a key for each of these flags.", "--config", panel=_PANEL)
    )
    for field in dataclasses.fields(EngineConfig):
        spelling = "--" + field.name.replace("_", "-")
        kind = _flag_type(hints[field.name])
        if kind is bool:
            spelling += "/--no-" + spelling.removeprefix("--")
        name = "model_flag" if field.name == "model" else field.name
        flags.append(flag(name, kind, field.metadata["help"], spelling, default=field.default, panel=_PANEL))
    return expand(command, "config", flags, _config)


def _model_argument() -> inspect.Parameter:
    help = "A Hugging Face directory, a .gguf file, a hub name, or the alias smollm2."
    argument = typer.Argument(help=help, show_default=EngineConfig().model)
    return inspect.Parameter(
        "model", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, argument]
    )


def _flag_type(hint: Any) -> type:
    """int | None -> int; str | int | None -> str, which can spell both."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    return str if str in kinds else kinds[0]


def _config(values: Mapping[str, Any]) -> EngineConfig:
    given = dict(values)
    file, model_flag = given.pop("config_file"), given.pop("model_flag")
    if given.get("model") and model_flag and given["model"] != model_flag:
        raise ConfigError(f"two models given, {given['model']} and --model {model_flag}: leave one out")
    given["model"] = given.get("model") or model_flag
    return EngineConfig.from_sources(given, file)

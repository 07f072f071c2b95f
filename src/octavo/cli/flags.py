"""Flags of commands, derived from the classes of settings, from SamplingParams, and from vLLM's names of settings."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec
import typer
from typer.core import TyperCommand

from octavo.config import EngineConfig, resolve_flags
from octavo.errors import ConfigError
from octavo.params import SamplingParams
from octavo.server.config import ServerConfig
from octavo.settings import Resolved, default_of, format_value, is_boolean, metavar, settings_of
from octavo.terminal import printable
from octavo.vllm_settings import VLLM

Result = TypeVar("Result")

CLASSES = (EngineConfig, ServerConfig)  # a --config file may set fields of both, even if the command uses only one
PANELS = {EngineConfig: "Engine", ServerConfig: "Server"}
SHORT = {"data_parallel_size": ("-dp",), "tensor_parallel_size": ("-tp",)}
_BOOLEANS = {name for kind in CLASSES for name in settings_of(kind) if is_boolean(kind, name)}
_FOREIGN = "octavo.vllm_flags"  # key of the context's `meta`
# Sampling parameters that are useless for one stream of text, and one that is also a setting of the engine.
_NOT_FLAGS = (
    *("n", "best_of", "logprobs", "logit_bias", "speculative_tokens", "structured_outputs"),
    *("repetition_detection", "output_kind"),
)
_TOKENS_PER_REQUEST = "--max-new-tokens"  # another common name for --max-tokens


class Command(TyperCommand):
    """A command that also accepts vLLM's flags. They are not typer options, since those are slow to build."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        rest, foreign = _take_foreign(args, own)
        ctx.meta[_FOREIGN] = foreign
        return super().parse_args(ctx, rest)


def settings_flags(
    *classes: type, model_argument: bool = True
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Replace the parameter `settings: Resolved` of a command by --config and a flag for each setting of `classes`.

    Args:
        model_argument: Whether the model may be given as an argument as well as by --model.
    """
    flags = [*([_model_argument()] if model_argument else []), _config_flag(), _context()]
    for kind in classes:
        flags += _flags_of(kind)
    return lambda command: _expand(command, "settings", flags, _resolve)


def engine_flags(command: Callable[..., Result]) -> Callable[..., Result]:
    """Replace the parameter `config: EngineConfig` of a command by MODEL, --config and the engine's flags."""
    flags = [_model_argument(), _config_flag(), _context()]
    flags += _flags_of(EngineConfig)
    return _expand(command, "config", flags, lambda values: _resolve(values).build(EngineConfig))


def sampling_flags(
    max_tokens: int | None, temperature: float = 0.7
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Replace the parameter `params: SamplingParams` of a command by a flag for each sampling parameter.

    Args:
        max_tokens: The default of --max-tokens; None generates until the context is full.
        temperature: The default of --temperature.
    """
    defaults: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    fields = [f for f in msgspec.structs.fields(SamplingParams) if f.name not in _NOT_FLAGS]

    def build(values: Mapping[str, Any]) -> SamplingParams:
        given = {name: value for name, value in values.items() if value not in (None, [])}
        return SamplingParams(**defaults | given)

    flags = [_sampling_flag(f, defaults.get(f.name, f.default)) for f in fields]
    return lambda command: _expand(command, "params", flags, build)


def _resolve(values: Mapping[str, Any]) -> Resolved:
    given = dict(values)
    file, context = given.pop("config_file"), given.pop("context")
    argument, flag = given.pop("model_argument", None), given.get("model")
    if argument and flag and argument != flag:
        raise ConfigError(f"two models are given, {argument} and --model {flag}; leave one out")
    given["model"] = argument or flag
    resolved = resolve_flags(CLASSES, given | context.meta[_FOREIGN], file)
    for warning in resolved.warnings:
        typer.echo(f"octavo: {printable(warning, lines=False)}", err=True)
    return resolved


def _take_foreign(args: Sequence[str], own: set[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate vLLM's flags, and --no-... of boolean settings, from what typer parses."""
    rest: list[str] = []
    foreign: dict[str, Any] = {}
    waiting = iter(args)
    for arg in waiting:
        if arg == "--":
            return [*rest, arg, *waiting], foreign
        spelling, equals, value = arg.partition("=")
        spelling = spelling.replace("_", "-")
        name = spelling.removeprefix("--").replace("-", "_")
        negated = name.startswith("no_") and (name.removeprefix("no_") in VLLM or name.removeprefix("no_") in _BOOLEANS)
        name = name.removeprefix("no_") if negated else name
        if negated and name in _BOOLEANS and not equals:
            foreign[name] = False
        elif not spelling.startswith("--") or spelling in own or name not in VLLM:
            rest.append(arg)
        elif VLLM[name].is_flag and not equals:
            foreign[name] = not negated
        else:
            if not equals and ((value := next(waiting, "")) == "" or value.startswith("--")):
                raise ConfigError(f"{spelling} needs a value")
            foreign[name] = value
    return rest, foreign


def _context() -> inspect.Parameter:
    return inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


def _model_argument() -> inspect.Parameter:
    argument = typer.Argument(
        help=settings_of(EngineConfig)["model"].metadata["help"],
        metavar="MODEL",
        show_default=False,
    )
    return _parameter("model_argument", str, argument)


def _config_flag() -> inspect.Parameter:
    help = "YAML file of settings, in lines `name: value`. The names are those of the flags."
    return _parameter(
        "config_file", Path, typer.Option("--config", metavar="FILE", help=help, rich_help_panel="Engine")
    )


@functools.cache
def _flags_of(kind: type) -> list[inspect.Parameter]:
    return [_setting_flag(kind, name) for name in settings_of(kind)]


def _setting_flag(kind: type, name: str) -> inspect.Parameter:
    spelling, default = "--" + name.replace("_", "-"), format_value(kind, name, default_of(kind, name))
    help = settings_of(kind)[name].metadata["help"]
    if is_boolean(kind, name):
        other = f"--no-{spelling.removeprefix('--')}"
        help += f" On by default; {other} turns it off." if default == "true" else " Off by default."
        return _parameter(name, bool, typer.Option(spelling, help=help, rich_help_panel=PANELS[kind]))
    help += _default(default if default_of(kind, name) not in (None, {}, "") else None)
    names = (spelling, *SHORT.get(name, ()))
    option = typer.Option(*names, help=help, metavar=metavar(kind, name), rich_help_panel=PANELS[kind])
    return _parameter(name, str, option)


def _default(value: Any) -> str:
    """Return a sentence for a flag's help. Typer would show the default in parentheses, on a line of its own."""
    return "" if value is None or value is False else f" Default: {value}."


def _sampling_flag(f: msgspec.structs.FieldInfo, default: Any) -> inspect.Parameter:
    hint, about = get_args(f.type)
    kind = next(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)  # int | None: int
    spellings = ["--" + f.name.replace("_", "-")]
    help = about.description
    if f.name == "max_tokens":
        spellings.append(_TOKENS_PER_REQUEST)
    if get_origin(kind) is list:
        help += " May be given several times."
    option = typer.Option(*spellings, help=help + _default(default), rich_help_panel="Sampling")
    return _parameter(f.name, kind, option)


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    """Return a parameter of a command that is None unless given."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _expand(
    command: Callable[..., Result],
    name: str,
    flags: Sequence[inspect.Parameter],
    build: Callable[[Mapping[str, Any]], Any],
) -> Callable[..., Result]:
    """Return `command` with its parameter `name` replaced by `flags`; `build` makes the parameter of their values.

    A parameter of the command's own hides the flag of the same name.
    """
    signature = inspect.signature(command, eval_str=True)
    flags = [flag for flag in flags if flag.name not in signature.parameters]
    names = [parameter.name for parameter in flags]

    @functools.wraps(command)
    def expanded(**arguments: Any) -> Result:
        values = {flag: arguments.pop(flag) for flag in names}
        return command(**arguments, **{name: build(values)})

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += flags if parameter.name == name else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    expanded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded

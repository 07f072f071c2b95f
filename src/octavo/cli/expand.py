"""One parameter of a command, expanded into several flags."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import typer

Result = TypeVar("Result")


def flag(
    name: str, kind: Any, help: str, *spellings: str, default: Any = None, panel: str | None = None
) -> inspect.Parameter:
    """A flag that is None unless given. `default`: what the help shows as what happens then."""
    option = typer.Option(
        *spellings, help=help, rich_help_panel=panel, show_default=False if default is None else str(default)
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def expand(
    command: Callable[..., Result],
    name: str,
    flags: Sequence[inspect.Parameter],
    build: Callable[[Mapping[str, Any]], Any],
) -> Callable[..., Result]:
    """`command` with its parameter `name` replaced by `flags`; it gets what `build` makes of their values."""
    signature = inspect.signature(command, eval_str=True)
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

"""How to sample, as flags of a command."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from octavo.params import SamplingParams

from .expand import expand, flag

Result = TypeVar("Result")
_PANEL = "Sampling"


def sampling_flags(max_tokens: int | None) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Replace the parameter `params: SamplingParams` of a typer command by flags.

    max_tokens: the default; None: up to the model's context. The default temperature is 0.7.
    """
    defaults: dict[str, Any] = {"temperature": 0.7, "max_tokens": max_tokens}
    flags = [
        flag("temperature", float, "Randomness; 0 always takes the likeliest token.", default=0.7, panel=_PANEL),
        flag(
            "top_p",
            float,
            "Sample among the likeliest tokens that have this probability together.",
            default=1.0,
            panel=_PANEL,
        ),
        flag("top_k", int, "Sample among so many of the likeliest tokens; 0: all.", default=0, panel=_PANEL),
        flag(
            "min_p",
            float,
            "Leave out tokens this many times less likely than the likeliest.",
            default=0.0,
            panel=_PANEL,
        ),
        flag("max_tokens", int, "New tokens at most.", default=max_tokens or "what fits in the context", panel=_PANEL),
        flag("seed", int, "Same seed, same text.", default="a new one each time", panel=_PANEL),
        flag("stop", list[str], "End before this string; may be given several times.", panel=_PANEL),
        flag("repetition_penalty", float, "Above 1: avoid what was said already.", default=1.0, panel=_PANEL),
    ]

    def build(values: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams(**(defaults | {name: value for name, value in values.items() if value not in (None, [])}))

    return lambda command: expand(command, "params", flags, build)

"""Parsers that separate a model's reasoning from its answer, with vLLM's names (--reasoning-parser)."""

from collections.abc import Mapping

from .deepseek_r1 import DeepSeekR1
from .granite import GraniteReasoning
from .openai_gptoss import HarmonyReasoning
from .parser import ReasoningParser
from .qwen3 import Qwen3

REASONING_PARSERS: Mapping[str, type[ReasoningParser]] = {
    "qwen3": Qwen3,
    "deepseek_r1": DeepSeekR1,
    "granite": GraniteReasoning,
    "openai_gptoss": HarmonyReasoning,
}

_MARKERS = (
    ("openai_gptoss", ("<|channel|>", "analysis")),
    ("granite", ("Here is my thought process:",)),
    ("qwen3", ("<think>",)),
    ("qwen3", ("</think>",)),
)


def find_reasoning_parser(template: str) -> str | None:
    """Return the name of the parser for models with this chat template; None if it does not mention reasoning."""
    return next((name for name, markers in _MARKERS if all(marker in template for marker in markers)), None)


def chosen_reasoning_parser(setting: str, template: str) -> str | None:
    """Return the name of the parser that the setting reasoning_parser chooses for a model; None for none."""
    if setting == "auto":
        return find_reasoning_parser(template)
    return None if setting == "none" else setting


__all__ = ["REASONING_PARSERS", "ReasoningParser", "chosen_reasoning_parser", "find_reasoning_parser"]

"""Parsers of tool calls, one for each format, with vLLM's names (--tool-call-parser)."""

from collections.abc import Mapping

from octavo.text.reader import AnswerParser

from .deepseek_v3 import DeepSeekV3
from .forced import Forced
from .granite import Granite
from .hermes import Hermes
from .json_answer import JsonAnswer
from .llama3_json import Llama3Json
from .llama4_pythonic import Llama4Pythonic
from .mistral import Mistral
from .openai import Harmony
from .phi4_mini_json import Phi4MiniJson
from .qwen3_xml import Qwen3Xml

TOOL_PARSERS: Mapping[str, type[AnswerParser]] = {
    "hermes": Hermes,
    "qwen3_xml": Qwen3Xml,
    "qwen3_coder": Qwen3Xml,
    "llama3_json": Llama3Json,
    "llama4_json": Llama3Json,
    "llama4_pythonic": Llama4Pythonic,
    "pythonic": Llama4Pythonic,
    "mistral": Mistral,
    "granite": Granite,
    "phi4_mini_json": Phi4MiniJson,
    "deepseek_v3": DeepSeekV3,
    "deepseek_v31": DeepSeekV3,
    "openai": Harmony,
    "json": JsonAnswer,
}

_MARKERS = (
    ("openai", ("<|channel|>", "<|message|>")),
    ("qwen3_xml", ("<function=",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("granite", ("<|tool_call|>", "<|start_of_role|>")),
    ("granite", ("<tool_call>", "<|start_of_role|>", "granite")),
    ("phi4_mini_json", ("<|tool|>",)),
    ("phi4_mini_json", ("functools",)),
    ("hermes", ("<tool_call>",)),
    ("llama4_pythonic", ("<|python_start|>",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters"')),
    ("json", ("tools",)),
)
"""Parser, and strings that are all in the chat templates of its models; the first match counts."""


def find_tool_parser(template: str) -> str:
    """Return the name of the parser for models with this chat template; "json" if it does not mention tools."""
    return next((name for name, markers in _MARKERS if all(marker in template for marker in markers)), "json")


__all__ = ["TOOL_PARSERS", "Forced", "JsonAnswer", "find_tool_parser"]

"""Which parsers read the answers of a chat."""

from collections.abc import Callable

import msgspec

from octavo.async_llm import AsyncLLM
from octavo.params import SamplingParams
from octavo.text.answer import AnswerEvent, TextDelta, ToolCallStart
from octavo.text.reader import AnswerParser
from octavo.text.reasoning import REASONING_PARSERS, ReasoningParser, chosen_reasoning_parser
from octavo.text.tools import TOOL_PARSERS, Forced, JsonAnswer, find_tool_parser

from .protocol import ChatRequest
from .tools import Tools

_MAY_BE_SPECIAL = (
    *("openai", "openai_gptoss", "mistral", "granite", "phi4_mini_json", "deepseek_v3", "deepseek_v31"),
    *("llama3_json", "llama4_json", "llama4_pythonic", "pythonic"),
)
"""Parsers of formats whose markers are special tokens, which the text of an answer does not have by default."""


class AnswerReader:
    """Reads one answer: reasoning first, then text and tool calls.

    Args:
        stages: parsers, each of which reads the text that the one before has left.
    """

    def __init__(self, stages: list[AnswerParser]):
        self._stages = stages
        self.has_calls = False

    def read(self, text: str, is_last: bool) -> list[AnswerEvent]:
        """Return the events that are final after more text."""
        events: list[AnswerEvent] = [TextDelta(text)] if text else []
        for stage in self._stages:
            events = [each for event in events for each in self._passed(stage, event)]
            if is_last:
                events += stage.finish()
        self.has_calls = self.has_calls or any(isinstance(event, ToolCallStart) for event in events)
        return events

    def _passed(self, stage: AnswerParser, event: AnswerEvent) -> list[AnswerEvent]:
        return stage.push(event.text) if isinstance(event, TextDelta) else [event]


def tool_parser(llm: AsyncLLM) -> str:
    """Return the name of the model's format of tool calls: the setting's, or that of its chat template."""
    name = llm.config.tool_call_parser
    return find_tool_parser(llm.tokenizer.template_source(with_tools=True)) if name == "auto" else name


def reasoning_parser(llm: AsyncLLM) -> str | None:
    """Return the name of the model's format of reasoning: the setting's, or that of its chat template."""
    return chosen_reasoning_parser(llm.config.reasoning_parser, llm.tokenizer.template_source())


def answer_reader(llm: AsyncLLM, body: ChatRequest, tools: Tools | None, prompt: str) -> Callable[[], AnswerReader]:
    """Return a function that makes a reader for an answer to `prompt`, the rendered chat."""
    streaming = bool(body.stream)
    makers: list[Callable[[], AnswerParser]] = []
    reasoning = None if body.separate_reasoning is False else expected_reasoning(llm, prompt)
    if reasoning:
        makers.append(lambda: _reasoning_stage(*reasoning))
    if tools is not None and tools.mode != "none":
        schemas = tools.schemas
        kind = {"named": Forced, "required": JsonAnswer}.get(tools.mode) or TOOL_PARSERS[tool_parser(llm)]
        if kind is TOOL_PARSERS["openai"]:
            makers.clear()  # it also reads the reasoning
        makers.append(lambda: kind(schemas, streaming))
    return lambda: AnswerReader([make() for make in makers])


def expected_reasoning(llm: AsyncLLM, prompt: str) -> tuple[type[ReasoningParser], bool] | None:
    """Return the parser of the reasoning in an answer to `prompt`, and whether the prompt has its start tag already.

    Returns None if answers have no reasoning, as far as model and prompt show.
    """
    name, ended = reasoning_parser(llm), prompt.rstrip()
    if name is None or ended.endswith("</think>"):  # the template has switched reasoning off
        return None
    return REASONING_PARSERS[name], ended.endswith("<think>")


def after_reasoning(llm: AsyncLLM, params: SamplingParams, prompt: str) -> SamplingParams:
    """Return sampling parameters whose constraint, if any, begins after the reasoning of an answer to `prompt`."""
    outputs, reasoning = params.structured_outputs, expected_reasoning(llm, prompt)
    if outputs is None or outputs.structural_tag or reasoning is None:
        return params
    kind, begins_inside = reasoning
    return msgspec.structs.replace(params, structured_outputs=kind.after_reasoning(outputs, begins_inside))


def _reasoning_stage(kind: type[ReasoningParser], begins_inside: bool) -> ReasoningParser:
    stage = kind()
    stage.begins_inside |= begins_inside
    return stage


def with_markers(llm: AsyncLLM, tools: Tools | None, params: SamplingParams) -> SamplingParams:
    """Return sampling parameters with which the text keeps special tokens, if a parser needs them."""
    reasoning = reasoning_parser(llm)
    parsers = [reasoning, tool_parser(llm) if tools is not None and not tools.is_forced else None]
    ends = REASONING_PARSERS[reasoning].ends if reasoning else ()
    special = [end for end in ends if llm.tokenizer.special_token(end) is not None]
    if special or any(name in _MAY_BE_SPECIAL for name in parsers):
        return msgspec.structs.replace(params, skip_special_tokens=False)
    return params

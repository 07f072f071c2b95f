"""Tool and reasoning parsers on answers in each model's documented format, cut at every character."""

# ruff: noqa: E501 (answers are not wrapped)

import json
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.answer import Answer, AnswerEvent, ArgumentsDelta, ReasoningDelta, TextDelta, ToolCallStart
from octavo.text.json_scanner import JsonScanner
from octavo.text.reader import AnswerParser
from octavo.text.reasoning import REASONING_PARSERS, find_reasoning_parser
from octavo.text.tools import TOOL_PARSERS, Forced, find_tool_parser

SCHEMAS: dict[str, Any] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "save": {"type": "object", "properties": {"text": {"type": "string"}, "tags": {"type": "array"}}},
    "now": {"type": "object", "properties": {}},
}
OSLO: tuple[str, Any] = ("weather", {"city": "Oslo", "days": 3})
SAVE: tuple[str, Any] = (
    "save",
    {"text": 'a "b"\n\\ é 漢字 🦊 </tool_call> ]}', "tags": [{"deep": [1, -2.5e3, None]}, [], True]},
)
NOW: tuple[str, Any] = ("now", {})


@dataclass
class Case:
    """An answer of a model, and what it means."""

    parser: str
    answer: str
    calls: list[tuple[str, Any]] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""


def obj(call: tuple[str, Any], key: str = "arguments", ascii: bool = False) -> str:
    return json.dumps({"name": call[0], key: call[1]}, ensure_ascii=ascii)


def xml(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def deepseek(call: tuple[str, Any]) -> str:
    block = f"```json\n{json.dumps(call[1], ensure_ascii=False)}\n```"
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call[0]}\n{block}<｜tool▁call▁end｜>"


def harmony(call: tuple[str, Any]) -> str:
    header = f"<|channel|>commentary to=functions.{call[0]} <|constrain|>json<|message|>"
    return header + json.dumps(call[1], ensure_ascii=False)


CASES = [
    Case("hermes", f"<tool_call>\n{obj(OSLO)}\n</tool_call>", [OSLO]),
    Case("hermes", f"Let me see. 🦊\n\n<tool_call>\n{obj(SAVE)}\n</tool_call>\n<tool_call>{obj(NOW)}</tool_call>", [SAVE, NOW], "Let me see. 🦊"),
    Case("hermes", f"<tool_call>{obj(SAVE, ascii=True)}</tool_call> Done.", [SAVE], " Done."),
    Case("hermes", '<tool_call>{"arguments": {"city": "Oslo", "days": 3}, "name": "weather"}</tool_call>', [OSLO]),
    Case("hermes", f"<tool_call>{obj(OSLO)}", [OSLO]),  # the end of the sequence in place of </tool_call>
    Case("hermes", '<tool_call>{"name": "now"}</tool_call>', [NOW]),
    Case("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 3}"}</tool_call>', [OSLO]),
    Case("hermes", "A plain answer, 1 < 2, <tool_cal", [], "A plain answer, 1 < 2, <tool_cal"),
    Case("qwen3_xml", "I look.\n" + xml("weather", city="Oslo", days="3"), [OSLO], "I look."),
    Case("qwen3_xml", xml("save", text=SAVE[1]["text"], tags=json.dumps(SAVE[1]["tags"])) + "\n" + xml("now"), [SAVE, NOW]),
    Case("qwen3_coder", "<function=now>\n</function>", [NOW]),
    Case("llama3_json", obj(OSLO, "parameters"), [OSLO]),
    Case("llama3_json", f"<|python_tag|>{obj(SAVE, 'parameters')}; {obj(NOW, 'parameters')}", [SAVE, NOW]),
    Case("llama3_json", '{"type": "function", "name": "now", "parameters": {}}', [NOW]),
    Case("llama3_json", "Hello {}", [], "Hello {}"),
    Case("llama3_json", '{"name": "unknown", "parameters": {}}', [], '{"name": "unknown", "parameters": {}}'),
    Case("llama4_pythonic", '[weather(city="Oslo", days=3)]', [OSLO]),
    Case("pythonic", f"<|python_start|>[save(text={SAVE[1]['text']!r}, tags=[{{'deep': [1, -2.5e3, None]}}, [], True]), now()]<|python_end|>", [SAVE, NOW]),
    Case("llama4_pythonic", "[1, 2] is a list", [], "[1, 2] is a list"),
    Case("mistral", f"[TOOL_CALLS][{obj(OSLO)}, {obj(SAVE)}]", [OSLO, SAVE]),
    Case("mistral", f"Sure.[TOOL_CALLS]weather[ARGS]{json.dumps(OSLO[1])}[TOOL_CALLS]now{{}}", [OSLO, NOW], "Sure."),
    Case("mistral", f"[TOOL_CALLS]save[CALL_ID]abc123DEF[ARGS]{json.dumps(SAVE[1])}", [SAVE]),
    Case("granite", f"<|tool_call|>[{obj(OSLO)}, {obj(SAVE)}]", [OSLO, SAVE]),
    Case("granite", f"<tool_call>[{obj(NOW)}]", [NOW]),
    Case("phi4_mini_json", f"functools[{obj(OSLO)}, {obj(NOW)}]", [OSLO, NOW]),
    Case("phi4_mini_json", f"<|tool_call|>[{obj(SAVE)}]<|/tool_call|>", [SAVE]),
    Case("phi4_mini_json", "import functools\nx = functools.cache", [], "import functools\nx = functools.cache"),
    Case("deepseek_v3", f"Well.<｜tool▁calls▁begin｜>{deepseek(OSLO)}\n{deepseek(SAVE)}<｜tool▁calls▁end｜>", [OSLO, SAVE], "Well."),
    Case("deepseek_v31", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', [NOW]),
    Case("openai", f"<|channel|>analysis<|message|>I need it.<|end|><|start|>assistant{harmony(OSLO)}<|call|>", [OSLO], "", "I need it."),
    Case("openai", f"<|channel|>analysis<|message|>Hm. 漢<|end|><|start|>assistant{harmony(SAVE)}", [SAVE], "", "Hm. 漢"),
    Case("openai", "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>It is 7 °C.<|return|>", [], "It is 7 °C.", "So."),
    Case("openai", " to=functions.now<|channel|>commentary json<|message|>{}", [NOW]),
    Case("openai", f"<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{json.dumps(OSLO[1])}", [OSLO], "I will look."),
    Case("json", obj(OSLO), [OSLO]),
    Case("json", f"\n```json\n[{obj(SAVE)}, {obj(NOW)}]\n```", [SAVE, NOW]),
    Case("json", '{"answer": 42}', [], '{"answer": 42}'),
]  # fmt: skip
MALFORMED = [
    ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>weather(Oslo)</tool_call>"),
    ("hermes", '<tool_call>{"name": "now", "arguments": {},}</tool_call>'),
    ("qwen3_xml", "<tool_call>\n<function=>\n</function>\n</tool_call>"),
    ("qwen3_xml", "<tool_call>\n<function=now>\nno parameter</function>"),
    ("llama3_json", '{"name": "now", "parameters": {"a": 01}}'),
    ("llama4_pythonic", "[weather('Oslo')]"),
    ("llama4_pythonic", "[weather(city=open('/etc/passwd'))]"),
    ("llama4_pythonic", "[weather(city={1, 2})]"),
    ("llama4_pythonic", "[weather(city=1e999)]"),
    ("llama4_pythonic", "[" * 5000),
    ("mistral", "[TOOL_CALLS]weather of Oslo"),
    ("mistral", '[TOOL_CALLS][{"arguments": {}}]'),
    ("granite", "<|tool_call|>[]"),
    ("phi4_mini_json", 'functools[{"name": "now" "arguments": {}}]'),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n{}"),
    ("openai", "<|channel|>analysis, whatever"),
    ("openai", "<|start|>user<|message|>hello"),
    ("json", '{"name": "now", "arguments": {}'),
    ("json", '{"name": "now", "arguments": "text"}'),
]


def events(parser: AnswerParser, pieces: list[str]) -> list[AnswerEvent]:
    found = [event for piece in pieces for event in parser.push(piece)]
    return found + parser.finish()


def parsed(name: str, pieces: list[str], streaming: bool, kinds: Any = TOOL_PARSERS) -> Answer:
    answer = Answer()
    answer.add(events(kinds[name](SCHEMAS, streaming), pieces))
    return answer


def comparable(answer: Answer) -> tuple[str, str, list[tuple[str, str]]]:
    return answer.text, answer.reasoning, [(call.name, call.arguments) for call in answer.tool_calls]


def check(answer: Answer, case: Case) -> None:
    calls = [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]
    assert (calls, answer.text, answer.reasoning) == (case.calls, case.text, case.reasoning)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parser}-{case.answer[:24]}")
def test_an_answer_cut_anywhere(case: Case) -> None:
    whole = parsed(case.parser, [case.answer], streaming=False)
    check(whole, case)
    for cut in range(len(case.answer) + 1):
        pieces = [case.answer[:cut], case.answer[cut:]]
        for streaming in (False, True):
            assert comparable(parsed(case.parser, pieces, streaming)) == comparable(whole)
    assert comparable(parsed(case.parser, list(case.answer), True)) == comparable(whole)


@pytest.mark.parametrize("parser, answer", MALFORMED)
def test_a_malformed_call_is_text(parser: str, answer: str) -> None:
    for pieces in ([answer], list(answer)):
        assert comparable(parsed(parser, pieces, streaming=False)) == (answer, "", [])


@pytest.mark.parametrize("case", [case for case in CASES if len(case.calls) == 1], ids=lambda case: case.answer[:24])
def test_a_truncated_call(case: Case) -> None:
    """Complete calls are calls; a call that was cut off is text, or in a stream what has come of its arguments."""
    for end in range(len(case.answer)):
        answer = case.answer[:end]
        whole = parsed(case.parser, [answer], streaming=False)
        if whole.tool_calls:
            assert case.text.startswith(whole.text)
            check(replace(whole, text=case.text), case)
        elif not whole.reasoning and "<|message|>" not in answer:
            assert whole.text == answer
        streamed = parsed(case.parser, list(answer), streaming=True)
        assert len(streamed.tool_calls) <= 1
        for call in streamed.tool_calls:
            assert (
                json.dumps(case.calls[0][1]).startswith(call.arguments.rstrip()) or whole.tool_calls or call.arguments
            )


def test_arguments_are_streamed_while_they_come() -> None:
    parser = TOOL_PARSERS["hermes"](SCHEMAS, True)
    assert parser.push('<tool_call>{"name": "weather", "argu') == []
    [start, first] = parser.push('ments": {"ci')
    assert isinstance(start, ToolCallStart) and (start.index, start.name) == (0, "weather")
    assert first == ArgumentsDelta(0, '{"ci')
    assert parser.push('ty": "Os') == [ArgumentsDelta(0, 'ty": "Os')]
    assert parser.push('lo"}}</tool_call>') == [ArgumentsDelta(0, 'lo"}')]
    assert parser.push('<tool_call>{"name": "now", "arguments": {}}')[1:] == [ArgumentsDelta(1, "{}")]
    assert parser.finish() == []


def test_a_call_that_goes_wrong_in_a_stream_keeps_what_was_sent() -> None:
    answer = parsed("hermes", list('<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>'), True)
    assert comparable(answer) == ("oops}}</tool_call>", "", [("now", '{"a": ')])


def test_text_is_streamed_but_for_what_may_begin_a_call() -> None:
    parser = TOOL_PARSERS["hermes"](SCHEMAS, True)
    assert parser.push("a <b> <tool") == [TextDelta("a <b>")]
    assert parser.push("s> c") == [TextDelta(" <tools> c")]


def test_ids() -> None:
    answer = parsed("mistral", [f"[TOOL_CALLS][{obj(NOW)}, {obj(NOW)}]"], False)
    first, second = (call.id for call in answer.tool_calls)
    assert first != second and len(first) == 9 and first.isalnum()
    assert parsed("json", [obj(NOW)], False).tool_calls[0].id.startswith("call_")


def test_a_forced_call() -> None:
    for pieces in (['{"city": "Oslo"}'], list('{"city": "Oslo"}')):
        answer = Answer()
        answer.add(events(Forced({"weather": {}}), pieces))
        assert comparable(answer) == ("", "", [("weather", '{"city": "Oslo"}')])


# Reasoning

REASONED = [
    ("qwen3", "<think>\nOne, two. 漢\n</think>\n\nThree.", "One, two. 漢", "Three."),
    ("qwen3", "\n<think></think>Three.", "", "Three."),
    ("qwen3", "<think>\nno end", "no end", ""),
    ("qwen3", "No reasoning </think> here. ", "", "No reasoning </think> here. "),
    ("qwen3", " <thinking> is text", "", " <thinking> is text"),
    ("deepseek_r1", "One, two.\n</think>\n\nThree.", "One, two.", "Three."),
    ("deepseek_r1", "<think>\nOne </thin k>\n</think>Three.", "One </thin k>", "Three."),
    ("granite", "Here is my thought process:\nOne.\nHere is my response:\nTwo.", "One.", "Two."),
    ("granite", "Here's my thought process: One. Here's my response: Two.", "One.", "Two."),
    ("granite", "Here is my cat.", "", "Here is my cat."),
    ("openai_gptoss", "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>Two.", "One.", "Two."),
]  # fmt: skip


@pytest.mark.parametrize("parser, answer, reasoning, text", REASONED)
def test_reasoning_cut_anywhere(parser: str, answer: str, reasoning: str, text: str) -> None:
    for cut in range(len(answer) + 1):
        got = parsed(parser, [answer[:cut], answer[cut:]], True, REASONING_PARSERS)
        assert (got.reasoning, got.text, got.tool_calls) == (reasoning, text, [])
    got = parsed(parser, list(answer), True, REASONING_PARSERS)
    assert (got.reasoning, got.text) == (reasoning, text)


def test_reasoning_is_streamed() -> None:
    parser = REASONING_PARSERS["qwen3"]()
    assert parser.push("<think>One, </t") == [ReasoningDelta("One,")]
    assert parser.push("wo") == [ReasoningDelta(" </two")]


# Any text

PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "now", "arguments": {', "}", "}}", "[", "]", '"', "\\", " ", "\n", "é", "🦊", "a",
     "<function=now>", "<parameter=a>", "</parameter>", "</function>", "[TOOL_CALLS]", "now", "(", ")", ",", ";", "1", "<", "|",
     "<|tool_call|>", "functools", "<|channel|>", "final", "<|message|>", " to=functions.now", "<|end|>", "<|start|>",
     "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "```json", "<|python_tag|>", "<think>", "</think>"]
)  # fmt: skip


KINDS = [(kinds, name) for kinds in (TOOL_PARSERS, REASONING_PARSERS) for name in sorted(kinds)]


@pytest.mark.parametrize("kinds, name", KINDS, ids=lambda each: each if isinstance(each, str) else "")
@settings(max_examples=40, deadline=None)
@given(answer=st.lists(PIECES, max_size=30), seed=st.integers(0, 10**6))
def test_nothing_is_lost(kinds: Any, name: str, answer: list[str], seed: int) -> None:
    """Text without a whole call comes back unchanged; however the text is cut, the result is the same."""
    text, draw = "".join(answer), random.Random(seed)
    whole = parsed(name, [text], False, kinds)
    cut = sorted(draw.randrange(len(text) + 1) for _ in range(5))
    pieces = [text[a:b] for a, b in zip([0, *cut], [*cut, len(text)], strict=True)]
    assert comparable(parsed(name, pieces, False, kinds)) == comparable(whole)
    assert comparable(parsed(name, pieces, True, kinds)) == comparable(parsed(name, [text], True, kinds))
    if not whole.tool_calls and kinds is TOOL_PARSERS and name != "openai":
        assert whole.text == text
    for call in whole.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans(), st.integers(0, 200))
def test_any_arguments(arguments: dict[str, Any], ascii: bool, cut: int) -> None:
    text = f"<tool_call>{obj(('f', arguments), ascii=ascii)}</tool_call>"
    [call] = parsed("hermes", [text[:cut], text[cut:]], True).tool_calls
    assert json.loads(call.arguments) == arguments


@settings(max_examples=200, deadline=None)
@given(VALUES | st.text(alphabet='{}[]",:\\u0eE+-.1tru fals', max_size=20))
def test_the_scanner_accepts_what_json_accepts(value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    scanner = JsonScanner()
    end = scanner.feed(text + "\0", 0)
    try:
        json.loads(text)
        valid = text.strip(" \t\n\r") not in ("NaN", "Infinity", "-Infinity")
    except ValueError:
        valid = False
    assert valid == (scanner.is_complete and not text[end:].strip(" \t\n\r"))


# Which parser


@pytest.mark.parametrize(
    "template, parser",
    [
        ("{% for tool in tools %}<tool_call>{{ tool | tojson }}", "hermes"),
        ("<tool_call>\n<function=name>\n<parameter=", "qwen3_xml"),
        ("<|python_tag|> <|start_header_id|>", "llama3_json"),
        (
            '<|start_header_id|> \'Respond in the format {"name": function name, "parameters": dictionary\'',
            "llama3_json",
        ),
        ("<|header_start|> <|python_start|>", "llama4_pythonic"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<|start_of_role|>assistant<|end_of_role|><|tool_call|>", "granite"),
        ("<|tool|>{{ message['tools'] }}<|/tool|>", "phi4_mini_json"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek_v3"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "openai"),
        ("{% if tools %}{{ tools }}{% endif %}", "json"),
        ("{{ messages }}", "json"),
    ],
)
def test_the_parser_of_a_template(template: str, parser: str) -> None:
    assert find_tool_parser(template) == parser
    assert parser in TOOL_PARSERS


def test_the_reasoning_parser_of_a_template() -> None:
    assert find_reasoning_parser("{{ messages }}") is None
    assert find_reasoning_parser("content.split('</think>')[-1] + '<think>\\n'") == "qwen3"
    assert find_reasoning_parser("<|channel|>analysis<|message|>") == "openai_gptoss"
    assert find_reasoning_parser("Here is my thought process: ") == "granite"


def test_a_call_after_a_malformed_one() -> None:
    wrong, right = (
        '<tool_call>{"name": "now", "arguments": {}, oops}</tool_call>',
        f"<tool_call>{obj(OSLO)}</tool_call>",
    )
    answer = parsed("hermes", [wrong + right], streaming=False)
    assert comparable(answer) == (wrong, "", [("weather", json.dumps(OSLO[1]))])

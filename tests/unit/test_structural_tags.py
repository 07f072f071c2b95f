"""Structural tags: which texts they accept, in the older and the newer format of vLLM."""

from pathlib import Path
from typing import Any

import pytest

from octavo import StructuredOutputs
from octavo.errors import InvalidRequest
from octavo.text import Tokenizer
from octavo.text.grammars import GrammarError

DIGIT = {"type": "json_schema", "json_schema": {"enum": [1, 2, 3]}}
POINT = {"type": "json_schema", "json_schema": {"type": "object", "properties": {"x": {"enum": [1, 2]}},
                                                "required": ["x"], "additionalProperties": False}}  # fmt: skip


def tag(begin: str, content: Any, end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


CALLS = {"triggers": ["<f"], "tags": [tag("<f=a>", POINT, "</f>"), tag("<f=b>", DIGIT, "</f>")]}
OLDER = {"structures": [{"begin": "<f=a>", "schema": POINT["json_schema"], "end": "</f>"}], "triggers": ["<f"]}
SEPARATED = {"type": "tags_with_separator", "separator": ", ", "tags": [tag("(", DIGIT, ")"), tag("[", POINT, "]")]}
JOINED = {"type": "tags_with_separator", "separator": "", "tags": [tag("(", DIGIT, ")")], "at_least_one": True}
TRIGGERED = {"type": "triggered_tags", **CALLS}
Case = tuple[dict[str, Any], list[str], list[str]]  # a tag, texts that it accepts, and texts that it does not
CASES: list[Case] = [
    (OLDER, ["", "text", 'a <f=a>{"x":1}</f> b', 'n\n<f=a>{"x":2}</f><f=a>{"x":1}</f>'], ["<f=c", '<f=a>{"x":3']),
    ({"format": TRIGGERED}, ["", "text", 'a <f=a>{"x":1}</f> b<f=b>2</f>'], ["<f=c", "<f=b>4"]),
    ({"format": TRIGGERED | {"at_least_one": True}}, ["a<f=b>1</f>b"], ["", "text"]),
    ({"format": TRIGGERED | {"stop_after_first": True}}, ["a", "a<f=b>1</f>"], ["a<f=b>1</f>b"]),
    ({"format": {"type": "sequence", "elements": [text("a/b"), DIGIT, text('"')]}}, ['a/b1"'], ["a/b4", "1", 'a/b1""']),
    ({"format": {"type": "or", "elements": [text("yes"), text("no"), DIGIT]}}, ["yes", "no", "3"], ["maybe", "yesno"]),
    ({"format": {"type": "regex", "pattern": "[a-c]+/\\/\\d"}}, ["ab//1"], ["ab/1", "d//1"]),
    ({"format": {"type": "any_text"}}, ["", "anything <f"], []),
    ({"format": tag("<t>", {"type": "any_text"}, ["</t>", "<e>"])}, ["<t>a\nb</t>", "<t><e>"], ["<t>a", "<t></t>b"]),
    ({"format": tag("<t>", DIGIT, "")}, ["<t>1"], ["<t>", "<t>1."]),
    ({"format": SEPARATED}, ["", "(1)", '(1), [{"x":2}], (3)'], ["(1)(2)", "(1),", "(4)"]),
    ({"format": JOINED}, ["(1)", "(1)(2)"], ["", "(1) (2)"]),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.load(tiny_llama)


def accepts(tokenizer: Tokenizer, structural_tag: dict[str, Any], text: str) -> bool:
    outputs = StructuredOutputs(structural_tag=structural_tag, disable_any_whitespace=True)
    matcher = tokenizer.grammars.matcher(outputs)
    try:
        matcher.accept([*tokenizer.encode(text, add_special_tokens=False), *sorted(tokenizer.eos_token_ids)[:1]])
        return True
    except GrammarError:
        return False


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_accepted_texts(tokenizer: Tokenizer, case: Case) -> None:
    structural_tag, accepted, refused = case
    assert [text for text in accepted if not accepts(tokenizer, structural_tag, text)] == []
    assert [text for text in refused if accepts(tokenizer, structural_tag, text)] == []


NESTED: dict[str, Any] = DIGIT
for _ in range(40):
    NESTED = {"type": "sequence", "elements": [NESTED]}


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"format": 1}, {"format": {"type": "what"}}, {"format": {"type": "sequence", "elements": [1]}},
        {"format": {"type": "const_string"}}, {"format": {"type": "json_schema", "json_schema": {"type": "wrong"}}},
        {"format": {"type": "triggered_tags", "triggers": ["<g"], "tags": [tag("<f>", DIGIT, "")]}},
        {"format": {"type": "triggered_tags", "triggers": ["<g"], "tags": []}}, {"format": NESTED},
        {"format": {"type": "sequence", "elements": [DIGIT] * 2000}}, {"structures": [], "triggers": ["<"]},
        {"structures": [{"begin": "<a>"}], "triggers": [1]}, {"structures": [{"begin": 1}], "triggers": ["<"]},
    ],
)  # fmt: skip
def test_malformed_tags_are_refused(tokenizer: Tokenizer, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        tokenizer.grammars.matcher(StructuredOutputs(structural_tag=wrong))

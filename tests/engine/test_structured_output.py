"""Structured output: every output follows its schema, the same tokens come out in any batch, and evil grammars are
refused within a bounded time."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from schema_cases import COLOR, POINT, SCHEMAS, SHORT, STRING, record, several
from schemas import fault

from octavo import LLM, SamplingParams, StructuredOutputs
from octavo.config import EngineConfig
from octavo.engine.loading import load_engine
from octavo.errors import InvalidRequest, RequestFailed
from octavo.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.load(tiny_llama)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama), max_batch_size=16) as llm:
        yield llm


def constrained(seed: int = 1, **fields: Any) -> SamplingParams:
    terms = {name: fields.pop(name) for name in set(fields) & set(SamplingParams.__struct_fields__)}
    outputs = StructuredOutputs(**fields)
    return SamplingParams(**{"temperature": 1.5, "seed": seed, "max_tokens": 300, **terms}, structured_outputs=outputs)


def test_outputs_follow_their_schemas(llm: LLM) -> None:
    assert len(SCHEMAS) >= 60
    params = [constrained(i, json=schema, disable_any_whitespace=True) for i, schema in enumerate(SCHEMAS)]
    outputs = [output.outputs[0] for output in llm.generate(["Answer:"] * len(params), params)]
    for schema, output in zip(SCHEMAS, outputs, strict=True):
        assert fault(output, schema) is None, (schema, output)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": "[a-c]{3}d{1,4}e"}, "[a-c]{3}d{1,4}e"),
        ({"choice": ["red", "green", 'a "quoted"\n/word', "é"]}, 'red|green|a "quoted"\n/word|é'),
        ({"grammar": 'start: "a" b b?\nb: "x" | "y" "!"'}, "a(x|y!){1,2}"),
        ({"grammar": 'root ::= "yes" | "no" [0-9]'}, "yes|no[0-9]"),
    ],
)
def test_other_constraints(llm: LLM, fields: dict[str, Any], pattern: str) -> None:
    for output in llm.generate("Say", constrained(n=8, **fields))[0].outputs:
        assert output.finish_reason == "stop" and re.fullmatch(pattern, output.text), output


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [({"regex": "[xy]{5}"}, "[xy]{5}"), ({"json": POINT}, '\\{"x":\\d,"y":\\d\\}'), ({"choice": ["no"]}, "no"),
     ({"grammar": 'root ::= "yes" | "no" [0-9]'}, "yes|no[0-9]")],
)  # fmt: skip
def test_a_constraint_begins_after_the_reasoning(llm: LLM, fields: dict[str, Any], pattern: str) -> None:
    inside = constrained(**fields, n=4, reasoning_end=["e", "."], disable_any_whitespace=True)
    for output in llm.generate("Say", inside)[0].outputs:
        assert output.finish_reason == "stop"
        assert re.fullmatch(f"(?s)[^e.]*[e.]\\s{{0,8}}({pattern})", output.text), output.text
    perhaps = constrained(**fields, n=8, reasoning_start=["<", "["], reasoning_end=["e"], disable_any_whitespace=True)
    texts = [output.text for output in llm.generate("Say", perhaps)[0].outputs if output.finish_reason == "stop"]
    assert all(re.fullmatch(f"(?s)(\\s{{0,8}}[<[][^e]*e\\s{{0,8}})?({pattern})", text) for text in texts), texts
    assert {text.lstrip()[0] in "<[" for text in texts} == {True, False}


@pytest.mark.parametrize("named", ["<|im_end|>", "<[2]>", "<[^1-5]>", '"\\\\" <[0-9]>'])
def test_a_grammar_cannot_name_tokens(tokenizer: Tokenizer, named: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot name tokens"):
        tokenizer.grammars.matcher(StructuredOutputs(grammar=f'start: "a" {named} "b"'))
    spelled = '// <|im_end|>\nstart: "<|im_end|>" /<[2]>/ # <x>'
    [output] = [tokenizer.grammars.matcher(StructuredOutputs(grammar=spelled))]
    output.accept(tokenizer.encode("<|im", add_special_tokens=False))


def test_a_schema_cannot_turn_its_enforcement_off(tokenizer: Tokenizer) -> None:
    schema = {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        tokenizer.grammars.matcher(StructuredOutputs(json=schema))


def test_special_tokens_never_come_out(llm: LLM, tokenizer: Tokenizer) -> None:
    bias = {token: 100.0 for token in range(tokenizer.vocab_size) if tokenizer.is_special(token)}
    [output] = llm.generate("Say", constrained(regex="(.|\n){20}", logit_bias=bias))[0].outputs
    assert len(output.text) == 20 and output.finish_reason == "stop"
    assert not any(map(tokenizer.is_special, output.token_ids))


def test_min_tokens_keeps_an_output_going_while_the_grammar_allows_more(llm: LLM) -> None:
    [long] = llm.generate("Say", constrained(regex="a{1,90}", min_tokens=6))[0].outputs
    assert len(long.token_ids) >= 6 or len(long.text) == 90
    [short] = llm.generate("Say", constrained(regex="a", min_tokens=6))[0].outputs
    assert (short.text, short.finish_reason) == ("a", "stop")


LONG = [
    {"json": several(POINT, 4, 8)},
    {"regex": "(abc|abd){10,20}"},
    {"json": record(a=SHORT, b=several(COLOR, 3, 6))},
]


def test_the_same_tokens_in_any_batch_with_drafts_and_after_preemption(tiny_llama: Path) -> None:
    terms = {"logprobs": 2, "max_tokens": 80}
    params = [constrained(i, **LONG[i % 3], temperature=i % 2, n=1 + i % 2, **terms) for i in range(9)]
    prompts = [[5 + i] * 20 for i in range(9)]

    def run(llm: LLM, **changes: Any) -> list[Any]:
        changed = [msgspec.structs.replace(each, **changes) for each in params]
        outputs = [completion for output in llm.generate(prompts, changed) for completion in output.outputs]
        return [(output.token_ids, output.cumulative_logprob, output.finish_reason) for output in outputs]

    with LLM(str(tiny_llama)) as llm:
        alone = [
            (output.token_ids, output.cumulative_logprob, output.finish_reason)
            for prompt, one in zip(prompts, params, strict=True)
            for output in llm.generate(prompt, one)[0].outputs
        ]
        assert run(llm) == alone
        assert run(llm, speculative_tokens=4) == alone
        assert llm.stats().accepted_tokens > 0
        page = llm.info.page_size
    with LLM(str(tiny_llama), max_model_len=128, kv_cache_memory=pool(tiny_llama, 10), max_batch_size=8) as llm:
        assert llm.info.page_size == page
        assert run(llm) == alone
        assert llm.stats().preemptions > 0


def test_turns_that_continue_kv_states(llm: LLM, tiny_llama: Path) -> None:
    first = llm.generate("A record:", constrained(**LONG[0]))[0]
    state = llm.get_kv_cache_state(first.request_id)
    turns = [constrained(i, **fields, speculative_tokens=i % 2) for i, fields in enumerate(LONG)]
    continued = llm.generate([" And"] * len(turns), turns, kv_cache_state=state)
    assert all(output.metrics.cached_tokens == state.num_tokens - 1 for output in continued)
    with LLM(str(tiny_llama), enable_prefix_caching=False) as other:
        whole = other.generate([output.prompt_token_ids for output in continued], turns)
    assert [output.outputs for output in continued] == [output.outputs for output in whole]


def pool(model: Path, pages: int) -> int:
    """Bytes of a KV pool of so many pages."""
    engine = load_engine(EngineConfig(model=str(model)), model)
    try:
        return pages * engine.backend.page_bytes
    finally:
        engine.close()


def test_a_matcher_is_rebuilt_behind_the_tokens_of_an_engine_that_crashed(tokenizer: Tokenizer) -> None:
    outputs = StructuredOutputs(json=POINT, disable_any_whitespace=True)
    tokens = tokenizer.encode('{"x":1,"y":2}', add_special_tokens=False)
    for cut in range(len(tokens)):
        first, rebuilt = tokenizer.grammars.matcher(outputs), tokenizer.grammars.matcher(outputs, tokens[:cut])
        for token in tokens[:cut]:
            first.masks()
            first.accept([token])
        assert rebuilt.masks() == first.masks()


EVIL = [
    {"json": {"type": "wrong"}}, {"json": "{"}, {"json": "[]"}, {"regex": "("}, {"regex": "(?=a)b"},
    {"regex": "(a{1000}){1000}"}, {"regex": "(" * 5000 + "a" + ")" * 5000}, {"grammar": "start: missing"},
    {"grammar": "root ::= missing"}, {"grammar": "root ::= " + "(" * 3000}, {"structural_tag": {"a": 1}},
    {"structural_tag": {"structures": [{"begin": "<a>"}], "triggers": ["<b"]}}, {"json": {"$ref": "#"}},
    {"json": {"$ref": "http://example.com/schema"}}, {"json": {"type": "string", "format": "no-such-format"}},
    {"json": {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(12)]}},
]  # fmt: skip


@pytest.mark.parametrize("fields", EVIL, ids=lambda fields: next(iter(fields)) + str(fields)[:30])
def test_evil_grammars_are_refused_in_a_bounded_time(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    started = time.thread_time()
    with pytest.raises(InvalidRequest) as refused:
        tokenizer.grammars.matcher(StructuredOutputs(**fields))
    assert time.thread_time() - started < 5
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_deep_and_large_schemas_end_in_a_bounded_time(llm: LLM) -> None:
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = record(a=deep)
    large = {"enum": [f"value {i}" for i in range(8000)]}
    for fields in ({"json": deep}, {"json": large}, {"regex": ".*a.{2000}"}, {"regex": "x?a{100000}"}):
        started = time.monotonic()
        with contextlib.suppress(InvalidRequest, RequestFailed):
            llm.generate("Say", constrained(max_tokens=20, **fields))
        assert time.monotonic() - started < 10


def test_a_grammar_that_fails_ends_its_own_request_only(llm: LLM) -> None:
    plain = SamplingParams(max_tokens=40, ignore_eos=True)
    wide = {"type": "object", "properties": {f"p{i}": STRING for i in range(2000)}}  # more than a row of the parser
    failing = constrained(json=wide, disable_any_whitespace=True, n=4)
    with pytest.raises(InvalidRequest, match="structured_outputs failed"):
        llm.generate(["Say", "Say"], [failing, plain])
    assert llm.generate("Say", plain)[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    "wrong", [{}, {"json": "{}", "regex": "a"}, {"regex": 1}, {"choice": []}, {"choice": "a"}, {"json_object": False},
              {"regex": "a" * 200_000}, {"what": 1}, 4]
)  # fmt: skip
def test_wrong_fields_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest):
        SamplingParams(structured_outputs=wrong)

"""The official test suite of JSON Schema (draft 2020-12, its mandatory part) against grammars: what a grammar accepts
must be valid, and what cannot be enforced is refused and documented.

A grammar may refuse some valid instances: for example, the properties of an object are in the order of the schema.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from octavo import StructuredOutputs
from octavo.errors import InvalidRequest
from octavo.text import Tokenizer
from octavo.text.grammars import GrammarError, Matcher

SUITE = Path(__file__).parents[1] / "support" / "json_schema_suite.json"
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "structured_output.md"
WALKS, MAX_TOKENS = 3, 60  # of random outputs


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.load(tiny_llama)


def compiled(tokenizer: Tokenizer, schema: dict[str, Any]) -> Matcher:
    return tokenizer.grammars.matcher(StructuredOutputs(json=schema, disable_any_whitespace=True))


def accepts(tokenizer: Tokenizer, schema: dict[str, Any], instance: Any) -> bool:
    matcher = compiled(tokenizer, schema)
    text = json.dumps(instance, ensure_ascii=False, separators=(",", ":"))
    try:
        matcher.accept(tokenizer.encode(text, add_special_tokens=False))
        return matcher.is_stopped or may_end(tokenizer, matcher)
    except GrammarError:
        return False


def may_end(tokenizer: Tokenizer, matcher: Matcher) -> bool:
    return any(token in tokenizer.eos_token_ids for token in allowed(matcher))


def allowed(matcher: Matcher) -> list[int]:
    mask = int.from_bytes(matcher.masks()[0], "little")
    return [token for token in range(mask.bit_length()) if mask >> token & 1]


def random_output(tokenizer: Tokenizer, schema: dict[str, Any], rng: random.Random) -> str | None:
    """A random output that the grammar accepts; None if it does not end by itself."""
    matcher, text = compiled(tokenizer, schema), b""
    for _ in range(MAX_TOKENS):
        if matcher.is_stopped:
            return text.decode()
        tokens = allowed(matcher)
        ends = [token for token in tokens if token in tokenizer.eos_token_ids]
        if ends and rng.random() < 0.5:
            return text.decode()
        token = rng.choice([token for token in tokens if token not in ends] or ends)
        matcher.accept([token])
        text += tokenizer.token_bytes(token)
    return None


def test_what_grammars_accept_is_valid(tokenizer: Tokenizer) -> None:
    rng, seen, wrong, refused = random.Random(0), Counter[str](), [], set[str]()
    for group in json.loads(SUITE.read_text())["groups"]:
        schema = group["schema"]
        try:
            compiled(tokenizer, schema)
        except InvalidRequest as error:
            refused.update(re.findall(r'"([$\w]+)"', str(error)) if "Unimplemented keys" in str(error) else ())
            continue
        seen["compiled"] += 1
        name = f"{group['file']}: {group['description']}"
        for case in group["tests"]:
            accepted = accepts(tokenizer, schema, case["data"])
            seen["valid and accepted" if accepted else "valid and refused"] += case["valid"]
            if accepted and not case["valid"]:
                wrong.append((name, case["data"]))
        validator = jsonschema.Draft202012Validator(schema)
        for _ in range(WALKS):
            text = random_output(tokenizer, schema, rng)
            if text is not None and not validator.is_valid(json.loads(text)):
                wrong.append((name, text))
    assert not wrong
    assert seen["compiled"] >= 160 and seen["valid and accepted"] > 10 * seen["valid and refused"], seen
    documented = DOCUMENTATION.read_text()
    assert refused and [key for key in sorted(refused) if f"`{key}`" not in documented] == []

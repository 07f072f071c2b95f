"""The sampling parameters that a model recommends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo import SamplingParams
from octavo.errors import DamagedWeights, OctavoError
from octavo.weights import generation_defaults
from tiny_gguf import write_gguf

FILE = "generation_config.json"


def test_a_model_of_the_hub(tmp_path: Path) -> None:
    """Qwen2.5-0.5B-Instruct's file."""
    (tmp_path / FILE).write_text(
        '{"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": true, "eos_token_id": [151645, 151643], '
        '"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0"}'
    )
    defaults = generation_defaults(tmp_path)
    assert defaults == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    assert SamplingParams(**defaults).top_k == 20  # type: ignore[arg-type]


def test_all_fields_and_none(tmp_path: Path, tiny_llama: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    assert generation_defaults(tiny_llama) == {}  # transformers writes a file without any
    (tmp_path / FILE).write_text('{"max_new_tokens": 5, "min_p": 0.1, "temperature": null, "num_beams": "many"}')
    assert generation_defaults(tmp_path) == {"max_tokens": 5, "min_p": 0.1}


def test_a_gguf_file(tiny_llama: Path, tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 40)
        writer.add_float32("general.sampling.min_p", 0.25)

    write_gguf(tiny_llama, tmp_path / "model.gguf", edit=edit)
    assert generation_defaults(tmp_path / "model.gguf") == {"temperature": 0.5, "top_k": 40, "min_p": 0.25}


@pytest.mark.parametrize(
    "content",
    [
        '{"temperature": -1}',
        '{"temperature": "0.7"}',
        '{"temperature": NaN}',
        '{"temperature": true}',
        '{"top_p": 1.5}',
        '{"top_k": 1.5}',
        '{"top_k": -2}',
        '{"min_p": Infinity}',
        '{"repetition_penalty": 1e-320}',
        '{"repetition_penalty": [1.1]}',
        '{"max_new_tokens": 0}',
        "[" * 100_000,
        "[]",
        "{",
        '{"top_k": ' + "1" * 5000 + "}",
    ],
)
def test_values_that_cannot_be(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DamagedWeights, match=FILE) as error:
        generation_defaults(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
FUZZ = settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = st.sampled_from(["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"])


@FUZZ
@given(content=st.dictionaries(KEYS, JSON), damage=st.binary(max_size=3), at=st.floats(0, 1))
def test_any_content(content: dict[str, Any], damage: bytes, at: float, tmp_path: Path) -> None:
    data = bytearray(json.dumps(content).encode())
    start = int(at * len(data))
    data[start : start + len(damage)] = damage
    (tmp_path / FILE).write_bytes(data)
    check(lambda: generation_defaults(tmp_path))


def check(read: Callable[[], dict[str, Any]]) -> None:
    try:
        defaults = read()
    except OctavoError as error:
        assert "\n" not in str(error)
        return
    SamplingParams(**{"max_tokens": 1, **defaults, "top_p": defaults.get("top_p") or 1.0})

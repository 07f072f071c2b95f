"""Models files: what they describe, and one line for each mistake."""

from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ConfigError
from octavo.fleet.specs import FleetSpec, Handling, ModelSpec, SplitSpec, model_spec, read_models

WHOLE = """
models:
  small:
    model: smollm2
    aliases: [gpt-4o, tiny]
    replicas: 2
    keep-loaded: yes
    max-num-seqs: 16            # vLLM's name
    kv_cache_memory: 64MiB
  large:
    model: /models/large
    quantization: 8bit
    load_on_demand: on
    idle_unload: 90
  "2024": smollm2
splits:
  chat: {small: 90, large: 10, sticky: user}
  "50": {small: 50, large: 49.5, "2024": 0.5}
memory: 8GiB
"""


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(content: str | bytes, **common: Any) -> FleetSpec:
        file = tmp_path / "models.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_models(file, common)

    return read


def test_all_that_a_file_can_say(read: Any) -> None:
    spec = read(WHOLE)
    small, large, year = spec.models
    assert (small.name, small.config.model, small.config.model_name) == ("small", "smollm2", "small")
    assert small.handling == Handling(aliases=["gpt-4o", "tiny"], keep_loaded=True)
    assert (small.config.data_parallel_size, small.config.max_batch_size) == (2, 16)
    assert small.config.kv_cache_memory == 64 * 2**20
    assert large.handling == Handling(load_on_demand=True, idle_unload=90)
    assert large.config.quantization == "8bit" and large.names == ["large"]
    assert (year.name, year.config.model) == ("2024", "smollm2")
    assert spec.splits[0] == SplitSpec("chat", {"small": 90, "large": 10}, "user")
    assert spec.splits[1].shares == {"small": 50, "large": 49.5, "2024": 0.5}
    assert spec.memory == 8 * 2**30


def test_a_file_before_flags_before_the_environment(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_MAX_BATCH_SIZE", "1")
    monkeypatch.setenv("OCTAVO_MAX_QUEUE", "1")
    monkeypatch.setenv("OCTAVO_THREADS", "1")
    monkeypatch.setenv("OCTAVO_MODEL", "another")
    monkeypatch.setenv("OCTAVO_SERVED_MODEL_NAME", "another")
    file = "models: {smollm2: {max_batch_size: 3}}"
    [model] = read(file, model="a third", max_batch_size=2, max_queue=2).models
    assert (model.config.max_batch_size, model.config.max_queue, model.config.threads) == (3, 2, 1)
    assert (model.name, model.config.model) == ("smollm2", "smollm2")


def test_an_anchor_for_common_settings(read: Any) -> None:
    first, second = read("models: {a: &a {model: x, max_batch_size: 3}, b: {<<: *a, model: y}}").models
    assert (first.config.model, second.config.model, second.config.max_batch_size) == ("x", "y", 3)


TWO = "models: {a: x, b: y}\nsplits: "
MANY_ALIASES = ", ".join(f"a{number}" for number in range(5000))
BOMB = "x: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}, *{before}, *{before}]\n"
    for before, name in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)
WRONG: dict[str | bytes, str] = {
    "": "models must be a mapping, such as {small: {model: smollm2}}",
    "[a, b]": "it must hold a mapping, such as models: {small: {model: smollm2}}",
    "models: {}": "models must be a mapping",
    "models: {a: 5}": "the model 'a' must be a mapping, such as {model: smollm2}",
    "models: {a: }": "the model 'a' must be a mapping",
    "models: {1: x}": "a model's name must be text, not 1 (put it in quotes)",
    "models: {1.10: x}": "a model's name must be text, not 1.1 (put it in quotes)",
    "models: {yes: x}": "a model's name must be text, not True (put it in quotes)",
    "models: {'': x}": "a model's name must have 1 to 256 printable characters, not ''",
    'models: {"a\\nb": x}': "a model's name must have 1 to 256 printable characters",
    "models: {[1]: x}": "cannot read",
    "models: {a: x, a: y}": "a is set twice",
    "models: {a: {1: 2}}": "in the model 'a', unknown setting 1",
    "models: {a: {model: 5}}": "in the model 'a', model must be the name of a model, not 5 (put it in quotes)",
    "models: {a: {model: x, max_batchsize: 4}}": "unknown setting 'max_batchsize': did you mean max_batch_size?",
    "models: {a: {model: x, port: 80}}": "in the model 'a', unknown setting 'port'",
    "models: {a: {model: x, keep_load: on}}": "unknown setting 'keep_load': did you mean keep_loaded?",
    "models: {a: {model: x, served-model-name: b}}": "in the model 'a', served_model_name is not possible",
    "models: {a: {model: x, replicas: 0}}": "must be from 1 to 256, not 0 (given as replicas)",
    "models: {a: {model: x, replicas: two}}": "must be an integer from 1 to 256, not 'two' (given as replicas)",
    "models: {a: {model: x, replicas: 2, data_parallel_size: 2}}": "are the same setting: leave one out",
    "models: {a: {model: x, aliases: [1]}}": "in the model 'a', aliases must be a list such as a,b, not [1]",
    "models: {a: {model: x, aliases: ['']}}": "in the model 'a', aliases must be names of 1 to 256 printable char",
    "models: {a: {model: x, aliases: [b, b]}}": "two models, aliases or splits have the name 'b'",
    "models: {a: {model: x, aliases: [a]}}": "two models, aliases or splits have the name 'a'",
    "models: {a: x, b: {model: y, aliases: [a]}}": "two models, aliases or splits have the name 'a'",
    "models: {a: {model: x, idle_unload: 0}}": "idle_unload must be a positive number of seconds, not 0",
    "models: {a: {model: x, idle_unload: .inf}}": "idle_unload must be a positive number of seconds, not inf",
    "models: {a: {model: x, keep_loaded: maybe}}": "keep_loaded must be true or false, not 'maybe'",
    "models: {a: {model: x, keep_loaded: on, idle_unload: 3}}": "keep_loaded must be false with idle_unload",
    "model: {a: x}": "unknown key 'model': did you mean models?",
    "models: {a: x}\nsplit: {}": "unknown key 'split': did you mean splits?",
    "models: {a: x}\nport: 80": "unknown key 'port': there are memory, models, splits",
    "models: {a: x}\nmemory: lots": "memory must be a size such as 4GiB or 500MB, not 'lots'",
    "models: {a: x}\nmemory: 0": "memory must be a size",
    TWO + "[]": "splits must be a mapping, such as {chat: {small: 90, large: 10}}",
    TWO + "{s: 5}": "the split 's' must be a mapping, such as {small: 90, large: 10}",
    TWO + "{s: {a: 90}}": "the shares of the split 's' add up to 90, not to 100",
    TWO + "{s: {sticky: user}}": "the shares of the split 's' add up to 0, not to 100",
    TWO + "{s: {a: 90, b: 10, c: 0}}": "the split 's' names 'c', which is no model: there are a, b",
    TWO + "{s: {a: 110, b: -10}}": "the share of 'a' in the split 's' must be from 0 to 100, not 110",
    TWO + "{s: {a: '90', b: 10}}": "the share of 'a' in the split 's' must be a number of percent, not '90'",
    TWO + "{s: {a: true, b: 10}}": "must be a number of percent, not True",
    TWO + "{s: {a: .nan, b: 10}}": "must be from 0 to 100, not nan",
    TWO + "{s: {a: 90, b: 10, sticky: ip}}": "sticky of the split 's' must be user or request_id, not 'ip'",
    TWO + "{a: {a: 90, b: 10}}": "two models, aliases or splits have the name 'a'",
    TWO + "{'': {a: 90, b: 10}}": "a split's name must have 1 to 256 printable characters",
    TWO + "{1: {a: 90, b: 10}}": "a split's name must be text, not 1 (put it in quotes)",
    "models: {b: {model: y, aliases: [a]}}\nsplits: {s: {a: 100}}": "the split 's' names 'a', which is no model",
    f"models: {{{', '.join(f'm{n}: x' for n in range(300))}}}": "a server needs from 1 to 256 models, not 300",
    f"models: {{a: {{model: x, aliases: [{MANY_ALIASES}]}}}}": "5001 names of models, aliases and splits, more than",
    "x" * 70_000: "it has more than 65536 bytes",
    BOMB: "it has more than 50000 values",
    "models: &m {a: {model: x, aliases: *m}}": "or one that contains itself",
    "models: !!python/object/apply:os.getpid []": "could not determine a constructor",
    "models: {a: {model: x, tensor_parallel_size: 3}}": "in the model 'a', tensor_parallel_size must be 1, 2",
    b"models: {\xff\xfe: x}": "can't decode byte 0xff",
}


@pytest.mark.parametrize(("content", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_mistakes(read: Any, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(content)
    text = str(error.value)
    assert message in text and "models.yaml" in text and "\n" not in text and len(text) < 600


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent"):
        read_models(tmp_path / "absent", {})
    with pytest.raises(ConfigError, match="cannot read"):
        read_models(tmp_path, {})


def test_what_a_swap_takes_over() -> None:
    old = model_spec("m", {"model": "x", "replicas": 2, "aliases": ["n"], "max_batch_size": 3, "kv_disk": None})
    new = model_spec("m", {"model": "y", "max_num_seqs": "5"}, old.inherited())
    assert new.config.model == "y" and new.names == ["m", "n"]
    assert (new.config.data_parallel_size, new.config.max_batch_size) == (2, 5)


def test_a_fleet_of_nothing() -> None:
    with pytest.raises(ConfigError, match="from 1 to 256 models, not 0"):
        FleetSpec([])
    same = model_spec("a", "x")
    with pytest.raises(ConfigError, match="the name 'a'"):
        FleetSpec([same, ModelSpec(config=same.config)])

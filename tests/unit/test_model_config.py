"""config.json: where it is silent, what scaling makes usable, ties that do not hold; against transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from family_models import PAGES, PROMPT, load_backend, reference_logits, relative_error
from octavo.config import EngineConfig
from octavo.engine.loading import load_engine
from octavo.errors import ConfigError, DamagedWeights, UnsupportedModel
from octavo.model import DecoderSpec, describe_model
from octavo.model.registry import find_family
from octavo.weights import open_checkpoint
from step_batches import run_chunks
from tiny_models import SHARDED

TinyModel = Callable[[str], Path]
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def spec_of(config: dict[str, Any]) -> DecoderSpec:
    return find_family(config).spec(config)


def change_config(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of `source`; values that are None are left out of its config."""
    shutil.copytree(source, target)
    config = {**json.loads((source / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


# Where config.json is silent

OPTIONAL = [
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("key", OPTIONAL)
def test_defaults_are_those_of_transformers(family: str, key: str, tmp_path: Path) -> None:
    """What we make of a config without a key is what we make of the one that transformers completes it to."""
    config = {
        "model_type": family,
        "vocab_size": 512,
        "hidden_size": 2048,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "sliding_window": 24,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 500000.0,
    }
    config.pop(key, None)
    if key == "rope_parameters":
        config.pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(config))
    complete = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert spec_of(config) == spec_of(complete)


def test_mistral_without_a_window(tiny_model: TinyModel, tmp_path: Path) -> None:
    silent = change_config(tiny_model("mistral"), tmp_path / "silent", sliding_window=None)
    config = json.loads((silent / "config.json").read_text())
    assert spec_of(config).windows == (4096,) * 3
    assert spec_of(config | {"sliding_window": None}).windows == (0,) * 3
    logits = run_chunks(load_backend("torch", silent, dtype="float32"), PROMPT, 64, PAGES)
    assert relative_error(logits, reference_logits(silent, PROMPT)) < 1e-4


# Rotary scaling

ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({}, 512),
        (ROPE["linear"], 2048),
        ({"type": "linear", "factor": 1.5}, 768),
        ({"rope_type": "linear", "factor": 1e12}, 2**31 - 1),
        (ROPE["llama3"] | {"original_max_position_embeddings": 64}, 512),
    ],
)
def test_positions_that_scaling_makes_usable(rope: dict[str, Any], positions: int, tiny_llama: Path) -> None:
    config = open_checkpoint(tiny_llama).config | {"rope_parameters": None, "rope_scaling": rope or None}
    assert spec_of(config).max_positions == positions


def test_a_context_beyond_max_position_embeddings(tiny_model: TinyModel) -> None:
    path = tiny_model("llama-linear-rope")
    config = EngineConfig(model=str(path), kv_cache_memory="8MiB", max_model_len=2048)
    engine = load_engine(config, path)
    assert engine.info.max_model_len == 2048
    engine.close()
    with pytest.raises(ConfigError, match="2048"):
        load_engine(EngineConfig(model=str(path), max_model_len=2049), path)
    prompt = np.random.default_rng(1).integers(0, 512, 600).tolist()  # max_position_embeddings is 512
    from octavo.backends.torch import load
    from octavo.model import describe_model

    checkpoint = open_checkpoint(path)
    backend = load(
        *describe_model(checkpoint.config, checkpoint.tensors), page_size=32, max_batch_tokens=600, max_batch_size=600,
        max_model_len=2048, threads=2, dtype="float32", quantization="none", device="cpu",
        progress=lambda done, total: None,
    )  # fmt: skip
    backend.allocate_kv(20)
    logits = run_chunks(backend, prompt, 600, list(range(19)))
    assert relative_error(logits, reference_logits(path, prompt)) < 1e-4


def test_of_two_rotary_embeddings_in_a_config_the_one_of_rope_scaling_counts(tiny_llama: Path) -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    config = open_checkpoint(tiny_llama).config | {"rope_parameters": linear}
    both = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": linear}
    assert spec_of(both) == spec_of(config)


def test_the_original_context_of_llama3_scaling_is_optional(tiny_llama: Path) -> None:
    config = open_checkpoint(tiny_llama).config
    silent = spec_of(config | {"rope_parameters": ROPE["llama3"]})
    explicit = spec_of(config | {"rope_parameters": ROPE["llama3"] | {"original_max_position_embeddings": 512}})
    outside = spec_of(
        config
        | {
            "rope_parameters": ROPE["llama3"] | {"original_max_position_embeddings": 64},
            "original_max_position_embeddings": 512,
        }
    )
    assert silent == explicit == outside


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"factor": 4.0}, "rope_parameters": None}, "a factor but no rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}}, "from layer to layer"),
        ({"rope_parameters": {"rope_type": "linear", "factor": True}}, "factor = True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor = -1"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "factor = nan"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "is not supported"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta = inf"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'; it must be true or false"),
        ({"attention_bias": 1}, "attention_bias = 1; it must be true or false"),
        ({"hidden_act": ["silu"]}, "is not supported"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6'"),
        ({"hidden_size": "x" * 10**6}, r"hidden_size = 'xxx.* \.\.\. xxx"),
        ({"architectures": [["LlamaForCausalLM"] * 10**5]}, "is not supported"),
    ],
)
def test_values_that_make_no_sense(change: dict[str, Any], message: str, tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    with pytest.raises((DamagedWeights, UnsupportedModel), match=message) as error:
        describe_model(checkpoint.config | change, checkpoint.tensors)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# Tied embeddings


def with_head(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def another_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBED].flip(0).contiguous()


def one_other_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBED].clone()
    tensors[HEAD][-1, -1] += 4


def the_same_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBED].clone()


def the_same_in_float32(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBED].float()


def only_the_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBED)


@pytest.mark.parametrize(
    ("edit", "tied"),
    [
        (another_head, False),
        (one_other_value, False),
        (the_same_head, True),
        (the_same_in_float32, True),
        (only_the_head, True),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_tied_head_that_differs_is_used(
    edit: Callable[[dict[str, torch.Tensor]], None], tied: bool, backend: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = with_head(tiny_llama, tmp_path / "model", edit)
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    assert spec.tied_embeddings is tied
    assert ("head" in parameters) is not tied
    logits = run_chunks(
        load_backend(backend, path, dtype="float32" if backend == "torch" else "auto"), PROMPT, 64, PAGES
    )
    assert relative_error(logits, reference_logits(path, PROMPT)) < 1e-2


# Several files


def test_the_index_decides_between_two_tensors_of_one_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model(SHARDED), tmp_path / "model"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name, expected = EMBED, open_checkpoint(folder).tensors[EMBED].float32()
    other = next(file for file in sorted(set(index.values()), reverse=True) if file != index[name])
    tensors = load_file(folder / other)
    save_file({**tensors, name: torch.zeros(512, 96)}, folder / other, {"format": "pt"})
    np.testing.assert_array_equal(open_checkpoint(folder).tensors[name].float32(), expected)

    third = sorted(set(index.values()))[0]
    for file in (third, other):
        tensors = load_file(folder / file)
        save_file({**tensors, "model.unlisted": torch.zeros(3)}, folder / file, {"format": "pt"})
    with pytest.raises(DamagedWeights, match=r"two files have a tensor 'model\.unlisted'"):
        open_checkpoint(folder)

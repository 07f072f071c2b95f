"""What the keys of a GGUF file mean, and what holds where they are absent: as in llama.cpp."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import gguf
import numpy as np
import pytest

from octavo.errors import DamagedWeights, UnsupportedModel
from octavo.formats.gguf import read_header
from octavo.model import DecoderSpec, describe_model
from octavo.weights import open_checkpoint
from tiny_gguf import write_gguf
from tiny_models import CONFIGS, random_model

TinyModel = Callable[[str], Path]
Edit = Callable[[gguf.GGUFWriter], None]


def spec_of(path: Path) -> DecoderSpec:
    checkpoint = open_checkpoint(path)
    return describe_model(checkpoint.config, checkpoint.tensors)[0]


def edited(source: Path, target: Path, *edits: Edit) -> Path:
    def edit(writer: gguf.GGUFWriter) -> None:
        for each in edits:
            each(writer)

    write_gguf(source, target, edit=edit)
    return target


def without(key: str) -> Edit:
    return lambda writer: writer.kv_data[0].pop(key)


def floats(key: str, value: float) -> Edit:
    return lambda writer: writer.add_float32(key, value)


def text(key: str, value: str) -> Edit:
    return lambda writer: writer.add_string(key, value)


def array(key: str, value: list[int]) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_array(key, value)

    return edit


# Rotary scaling. tiny llama turns pair i by 10000 ** (-i / 16) radians a position.

FACTOR, OLD_FACTOR, TYPE = "llama.rope.scaling.factor", "llama.rope.scale_linear", "llama.rope.scaling.type"


@pytest.mark.parametrize(
    ("edits", "factor"),
    [
        ([floats(FACTOR, 4.0)], 4.0),
        ([floats(OLD_FACTOR, 4.0)], 4.0),
        ([floats(FACTOR, 2.0), floats(OLD_FACTOR, 4.0)], 2.0),
        ([floats(FACTOR, 0.0), floats(OLD_FACTOR, 4.0)], 1.0),
        ([floats(FACTOR, 4.0), text(TYPE, "none")], 1.0),
        ([floats(OLD_FACTOR, 4.0), text(TYPE, "linear")], 4.0),
        ([text(TYPE, "linear")], 1.0),
        ([], 1.0),
    ],
)
def test_rope_scaling(edits: list[Edit], factor: float, tiny_llama: Path, tmp_path: Path) -> None:
    spec = spec_of(edited(tiny_llama, tmp_path / "model.gguf", *edits))
    np.testing.assert_allclose(spec.rope.frequencies(32), 10000.0 ** (-np.arange(16) / 16) / factor, rtol=1e-6)
    assert spec.max_positions == 512 * factor


def test_rope_divisors_and_a_factor_multiply(tiny_model: TinyModel, tmp_path: Path) -> None:
    alone = spec_of(edited(tiny_model("llama3-rope"), tmp_path / "alone.gguf")).rope.frequencies(32)
    both = spec_of(edited(tiny_model("llama3-rope"), tmp_path / "both.gguf", floats(FACTOR, 2.0))).rope.frequencies(32)
    np.testing.assert_allclose(both, alone / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (text(TYPE, "yarn"), UnsupportedModel, "'yarn' is not supported"),
        (text(TYPE, "su"), UnsupportedModel, "'su' is not supported"),
        (floats(FACTOR, -4.0), DamagedWeights, r"factor = -4\.0"),
        (floats(FACTOR, float("nan")), DamagedWeights, "scaling factor of nan"),
        (text(FACTOR, "4"), DamagedWeights, "scaling factor of '4'"),
        (floats("llama.rope.scaling.attn_factor", 1.5), UnsupportedModel, "attn_factor = 1.5"),
        (floats("llama.attention.scale", 0.5), UnsupportedModel, "attention.scale = 0.5"),
        (lambda writer: writer.add_bool("llama.attention.causal", False), UnsupportedModel, "causal = False"),
    ],
)
def test_what_changes_the_arithmetic_is_used_or_refused(
    edit: Edit, error: type[Exception], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = edited(tiny_llama, tmp_path / "model.gguf", edit)
    with pytest.raises(error, match=message):
        spec_of(path)


# Absent keys, and values per layer


@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "context_length", "block_count"])
def test_keys_that_a_model_must_have(key: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = edited(tiny_llama, tmp_path / "model.gguf", without(f"llama.{key}"))
    with pytest.raises(DamagedWeights, match=rf"has no llama\.{key}"):
        spec_of(path)


def test_without_key_value_heads_there_are_as_many_as_heads(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = edited(tiny_model("llama"), tmp_path / "fewer.gguf", without("llama.attention.head_count_kv"))
    with pytest.raises(DamagedWeights, match="k_proj"):  # there are fewer, which is now a contradiction
        spec_of(path)
    config = deepcopy(CONFIGS["llama"])
    config.num_key_value_heads = 6
    random_model(config).save_pretrained(tmp_path / "equal")
    path = edited(tmp_path / "equal", tmp_path / "equal.gguf", without("llama.attention.head_count_kv"))
    assert spec_of(path).num_kv_heads == 6


@pytest.mark.parametrize("key", ["attention.head_count_kv", "attention.head_count", "feed_forward_length"])
def test_values_per_layer(key: str, tiny_llama: Path, tmp_path: Path) -> None:
    value = {"attention.head_count_kv": 2, "attention.head_count": 6, "feed_forward_length": 160}[key]
    equal = edited(tiny_llama, tmp_path / "equal.gguf", array(f"llama.{key}", [value] * 3))
    assert spec_of(equal) == spec_of(edited(tiny_llama, tmp_path / "plain.gguf"))
    for wrong in ([value, value, value // 2], [value] * 2):
        path = edited(tiny_llama, tmp_path / "wrong.gguf", array(f"llama.{key}", wrong))
        with pytest.raises(UnsupportedModel, match="from layer to layer"):
            spec_of(path)


def test_the_size_of_a_head_follows_from_the_others(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Qwen3's config.json has 128 where it is silent; a GGUF file does not."""
    keys = ["qwen3.attention.key_length", "qwen3.attention.value_length"]
    path = edited(tiny_model("qwen3"), tmp_path / "model.gguf", *map(without, keys))
    assert open_checkpoint(path).config["head_dim"] == 96 // 4


# The table of tensors


def test_tensors_follow_one_another(tiny_llama: Path, tmp_path: Path) -> None:
    """Each bit of each offset, flipped: the tensors would overlap, or leave a gap."""
    path = tmp_path / "model.gguf"
    write_gguf(tiny_llama, path, "Q8_0")
    data = path.read_bytes()
    tensors = read_header(path).tensors
    for tensor in (tensors[0], tensors[1], tensors[-1]):
        name = tensor.name.encode()
        entry = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
        at = entry + 4 + 8 * len(tensor.shape) + 4
        offset = int.from_bytes(data[at : at + 8], "little")
        assert offset == tensor.start - tensors[0].start
        for bit in range(0, 40):
            damaged = (offset ^ 1 << bit).to_bytes(8, "little")
            path.write_bytes(data[:at] + damaged + data[at + 8 :])
            with pytest.raises(DamagedWeights, match=r"is at offset|does not fit in the file"):
                read_header(path)


def test_two_names_for_one_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    def twice(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("model.norm.weight", np.ones(96, np.float32))

    with pytest.raises(DamagedWeights, match=r"two tensors named 'model\.norm\.weight'"):
        open_checkpoint(edited(tiny_llama, tmp_path / "model.gguf", twice))


def test_sparse_files_need_little_memory(tmp_path: Path) -> None:
    """A file of 40 GB that claims arrays and strings of gigabytes, all zeros that take no space on disk."""

    def u64(value: int) -> bytes:
        return value.to_bytes(8, "little")

    begin = b"GGUF" + (3).to_bytes(4, "little")
    key = u64(1) + b"k"
    string, strings, numbers = (
        (8).to_bytes(4, "little"),
        *((9).to_bytes(4, "little") + kind.to_bytes(4, "little") for kind in (8, 0)),
    )
    for content, reason in [
        (u64(0) + u64(1) + key + string + u64(2**34), "a string runs past the end"),
        (u64(0) + u64(1) + key + strings + u64(2**30), "does not fit"),
        (u64(0) + u64(1) + key + numbers + u64(2**33), "does not fit"),
        (u64(0) + u64(1) + key + numbers + u64(2**26), "the limit of"),
        (u64(2**20) + u64(0), "the limit of"),
        (u64(0) + u64(2**20), "the limit of"),
    ]:
        with (tmp_path / "model.gguf").open("wb") as file:
            file.write(begin + content)
            file.truncate(40 << 30)
        with pytest.raises(DamagedWeights, match=reason):
            read_header(tmp_path / "model.gguf")

"""Checkpoints: safetensors directories and .gguf files against independent readers; damaged ones."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from octavo.errors import DamagedWeights, ModelNotFound, OctavoError, UnsupportedModel
from octavo.formats.blocks import BLOCK_FORMATS, GGML_TYPES
from octavo.formats.gguf import read_header
from octavo.model import describe_model
from octavo.weights import Checkpoint, Tensor, open_checkpoint
from tiny_gguf import K_QUANTS, QUANTISABLE, write_gguf
from tiny_models import CONFIGS, SHARDED, save_tiny_model

TinyModel = Callable[[str], Path]


def hugging_face_tensors(folder: Path) -> dict[str, np.ndarray]:
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.float().numpy() for tensors in files for name, tensor in tensors.items()}


def one_line(error: pytest.ExceptionInfo[OctavoError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_hold_what_torch_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path, dtype)
    tensors, expected = open_checkpoint(folder).tensors, hugging_face_tensors(folder)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert tensors[name].shape == values.shape
        np.testing.assert_array_equal(tensors[name].float32(), values)
        np.testing.assert_array_equal(tensors[name].float32(3, 9), values[3:9])


def test_shards_are_one_checkpoint(tiny_model: TinyModel) -> None:
    folder = tiny_model(SHARDED)
    assert len(list(folder.glob("*.safetensors"))) > 1
    tensors = open_checkpoint(folder).tensors
    expected = hugging_face_tensors(folder)
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name].float32(), values) for name, values in expected.items())


@pytest.mark.parametrize("model", CONFIGS)
def test_a_gguf_is_the_directory_it_was_made_of(model: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    write_gguf(tiny_model(model), tmp_path / "model.gguf")
    of_gguf, of_directory = open_checkpoint(tmp_path / "model.gguf"), open_checkpoint(tiny_model(model))
    # GGUF has numbers in float32, and no place for Qwen's windows.
    of_directory.config.update(rms_norm_eps=float(np.float32(1e-6)), use_sliding_window=False)
    spec, parameters = describe_model(of_gguf.config, of_gguf.tensors)
    expected_spec, expected = describe_model(of_directory.config, of_directory.tensors)
    frequencies = spec.rope.frequencies(spec.head_dim)
    np.testing.assert_allclose(frequencies, expected_spec.rope.frequencies(spec.head_dim), rtol=1e-6)
    assert spec == expected_spec or model == "llama3-rope"  # whose factors differ in the last bit
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        for part, expected_part in zip(parameter.parts, expected[name].parts, strict=True):
            np.testing.assert_array_equal(part.float32(), expected_part.float32())


@pytest.mark.parametrize("format", QUANTISABLE + K_QUANTS)
def test_every_gguf_format(format: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    expected = write_gguf(tiny_model("llama-256"), tmp_path / "model.gguf", format)
    tensors = open_checkpoint(tmp_path / "model.gguf").tensors
    assert tensors.keys() == expected.keys()
    assert {tensor.format for tensor in tensors.values()} == {format, "F32"}
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors[name].float32(), values)
        np.testing.assert_array_equal(tensors[name].float32(5, 8), values[5:8])


def test_all_supported_formats_are_tested() -> None:
    tested_elsewhere = {"W4G32", "W8G32"}  # in test_checkpoint_quantization
    assert set(QUANTISABLE + K_QUANTS) | tested_elsewhere == set(BLOCK_FORMATS)


def test_format_sizes_are_those_of_the_gguf_package() -> None:
    for kind, format in GGML_TYPES.items():
        ggml = gguf.GGMLQuantizationType(kind)
        assert (format.name, (format.values, format.nbytes)) == (ggml.name, gguf.GGML_QUANT_SIZES[ggml])


def test_smollm2_opens_at_once(smollm2: Path) -> None:
    open_checkpoint(smollm2)
    start = time.process_time()
    checkpoint = open_checkpoint(smollm2)
    assert time.process_time() - start < 0.3
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size, spec.max_positions) == (30, 576, 49152, 8192)
    assert parameters["layers.29.qkv"].shape == (960, 576)


def test_released_tensors_leave_memory(smollm2: Path) -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))

    tensors = open_checkpoint(smollm2).tensors.values()
    total = sum(tensor.data.nbytes for tensor in tensors)
    before = resident()
    for tensor in tensors:
        tensor.data.max()
    assert resident() - before > 0.9 * total
    for tensor in tensors:
        tensor.release()
    assert resident() - before < 0.1 * total


# What can be wrong with a directory.


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "model"))


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_safetensors(keep: float, tiny_model: TinyModel, tmp_path: Path) -> None:
    file = copied(tiny_model("llama"), tmp_path) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(DamagedWeights, match="download it again") as error:
        open_checkpoint(file.parent)
    assert str(file) in one_line(error)


def test_a_missing_shard_and_a_lying_index(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_model(SHARDED), tmp_path)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    index_file.write_text(json.dumps(index))
    with pytest.raises(DamagedWeights, match=r"model\.extra\.weight"):
        open_checkpoint(folder)
    index["weight_map"]["model.extra.weight"] = "../elsewhere.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(DamagedWeights, match="outside the directory"):
        open_checkpoint(folder)
    index_file.write_text("{}")
    with pytest.raises(DamagedWeights, match="no usable weight_map"):
        open_checkpoint(folder)
    shutil.copy(tiny_model(SHARDED) / index_file.name, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelNotFound, match="missing") as error:
        open_checkpoint(folder)
    assert str(shard) in one_line(error)


def test_directories_that_are_no_models(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    folder = copied(tiny_model("llama"), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle"):
        open_checkpoint(folder)
    for content in ("{", "[]", '"\\ud800"', "[" * 100_000):
        (folder / "config.json").write_text(content)
        with pytest.raises(DamagedWeights) as error:
            open_checkpoint(folder)
        assert "config.json" in one_line(error)


# What can be wrong with a .gguf file.


def test_gguf_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(ModelNotFound):
        open_checkpoint(file)
    for content in (b"", b"GGU", b"PK\x03\x04" + bytes(100), b"GGUF" + bytes(100), b"GGUF\x03\0\0\0" + b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises((DamagedWeights, UnsupportedModel)) as error:
            open_checkpoint(file)
        assert str(file) in one_line(error)


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def string(text: bytes) -> bytes:
    return number(len(text)) + text


def header(keys: list[bytes], tensors: list[bytes], num_keys: int | None = None) -> bytes:
    counts = number(len(tensors)) + number(len(keys) if num_keys is None else num_keys)
    return b"GGUF" + number(3, 4) + counts + b"".join(keys) + b"".join(tensors) + bytes(64)


def tensor_info(dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(b"t") + number(len(dims), 4) + b"".join(map(number, dims)) + number(kind, 4) + number(offset)


U8, U32, STRING, ARRAY = (number(kind, 4) for kind in (0, 4, 8, 9))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header([], [], num_keys=2**63), "a count of 9223372036854775808 does not fit"),
        (header([string(b"k") + STRING + number(2**40)], []), "a string runs past the end"),
        (header([string(b"k") + ARRAY + U32 + number(60)], []), "an array runs past the end"),
        (header([string(b"k") + ARRAY + U8 + number(2**62)], []), "does not fit in the file"),
        (header([string(b"k") + ARRAY + ARRAY + number(1)], []), "value type 9"),
        (header([string(b"k") + U8 + b"\0"] * 2, []), "key 'k' occurs twice"),
        (header([string(b"\xff") + U8 + b"\0"], []), "invalid start byte"),
        (header([string(b"general.alignment") + U32 + number(0, 4)], []), "alignment 0"),
        (header([], [tensor_info([1])] * 2), "two tensors have the same name"),
        (header([], [tensor_info([])]), "0 dimensions"),
        (header([], [tensor_info([0])]), "does not fit in the file"),
        (header([], [tensor_info([2**62, 2**62])]), "does not fit in the file"),
        (header([], [tensor_info([1], offset=2**63)]), "does not fit in the file"),
        (header([], [tensor_info([8], kind=8)]), "does not fit in the file"),  # a quarter of a Q8_0 block
        (header([], [tensor_info([1], kind=999)]), "unknown GGML type 999; supported are F32"),
        (header([], [tensor_info([256], kind=23)]), "stored as IQ4_XS"),
    ],
)
def test_lies_in_a_gguf_header(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises((DamagedWeights, UnsupportedModel), match=reason) as error:
        read_header(tmp_path / "model.gguf")
    one_line(error)


def test_truncated_gguf(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(tiny_model("llama"), file, "Q8_0")
    data = file.read_bytes()
    for keep in (50, 500, len(data) // 2, len(data) - 100):
        file.write_bytes(data[:keep])
        with pytest.raises(DamagedWeights, match="download it again") as error:
            open_checkpoint(file)
        assert str(file) in one_line(error)


def test_other_gguf_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"'mamba'; supported in GGUF are llama") as error:
        open_checkpoint(tmp_path / "model.gguf")
    one_line(error)


# Both parsers under random damage: a checkpoint whose tensors lie in the file, or one line that says what is wrong.


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("small")
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(2, 2, 2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    source = save_tiny_model("llama", tmp_path_factory.mktemp("source"))
    write_gguf(source, folder / "model.gguf", "Q8_0")
    return {"safetensors": folder / "model.safetensors", "gguf": folder / "model.gguf"}


def check_opens_or_refuses(path: Path) -> None:
    try:
        tensors = open_checkpoint(path).tensors
    except OctavoError as error:
        assert "\n" not in str(error)
        return
    for tensor in tensors.values():
        assert 0 not in tensor.shape and tensor.data.size > 0
        if tensor.format in BLOCK_FORMATS and len(tensor.shape) <= 2:
            with np.errstate(all="ignore"):
                assert tensor.float32().shape == tensor.shape


FUZZ = settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
DAMAGE = st.one_of(
    st.binary(min_size=1, max_size=9),
    st.sampled_from([2**64 - 1, 2**63, 2**63 - 1, 2**32, 2**31, 0]).map(lambda n: n.to_bytes(8, "little")),
)


@FUZZ
@given(at=st.floats(0, 1), damage=DAMAGE)
def test_damaged_safetensors_headers(at: float, damage: bytes, small_files: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(small_files["safetensors"].read_bytes())
    start = int(at * (8 + int.from_bytes(data[:8], "little")))
    data[start : start + len(damage)] = damage
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(data)
    check_opens_or_refuses(tmp_path)


@FUZZ
@given(at=st.floats(0, 1), damage=DAMAGE)
def test_damaged_gguf_headers(at: float, damage: bytes, small_files: dict[str, Path], tmp_path: Path) -> None:
    source = small_files["gguf"]
    data = bytearray(source.read_bytes())
    start = int(at * min(tensor.start for tensor in read_header(source).tensors))
    data[start : start + len(damage)] = damage
    (tmp_path / "model.gguf").write_bytes(data)
    check_opens_or_refuses(tmp_path / "model.gguf")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 3), max_size=3),
    st.sampled_from(["linear", "llama3", "factors", "yarn"]),
)


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("model", ["llama3-rope", "mistral", "qwen2", "qwen3"])
def test_damaged_configs(model: str, data: st.DataObject, tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_model(model))
    key = data.draw(st.sampled_from(sorted(checkpoint.config)))
    describe_or_refuse(checkpoint, checkpoint.config | {key: data.draw(JUNK)})
    rope = checkpoint.config["rope_parameters"]
    rope_key = data.draw(st.sampled_from([*sorted(rope), "partial_rotary_factor"]))
    describe_or_refuse(checkpoint, checkpoint.config | {"rope_parameters": rope | {rope_key: data.draw(JUNK)}})


def describe_or_refuse(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    try:
        describe_model(config, checkpoint.tensors)
    except OctavoError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size = None"),
        ({"head_dim": 2**30}, "head_dim = 1073741824; it must be an integer from 1 to 8,192"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_key_value_heads": 4}, "6 heads of 32 over 4"),
        ({"hidden_act": "relu"}, "'relu' is not supported; supported are silu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.* supported are LlamaForCausalLM, Mistral"),
        ({"architectures": None, "model_type": "phi"}, "'phi' is not supported"),
    ],
)
def test_configs_that_octavo_refuses(change: dict[str, Any], message: str, tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    with pytest.raises((DamagedWeights, UnsupportedModel), match=message) as error:
        describe_model(checkpoint.config | change, checkpoint.tensors)
    one_line(error)


def test_configs_of_older_transformers(tiny_model: TinyModel) -> None:
    """They had rope_theta and rope_scaling where there is rope_parameters now, and no layer_types."""
    checkpoint = open_checkpoint(tiny_model("llama3-rope"))
    rope = dict(checkpoint.config.pop("rope_parameters"))
    old = checkpoint.config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    new = open_checkpoint(tiny_model("llama3-rope")).config
    assert describe_model(old, checkpoint.tensors)[0] == describe_model(new, checkpoint.tensors)[0]

    windows = open_checkpoint(tiny_model("qwen2"))
    old = {key: value for key, value in windows.config.items() if key != "layer_types"}
    assert describe_model(old, windows.tensors)[0].windows == (0, 20, 20)
    assert describe_model(old | {"use_sliding_window": False}, windows.tensors)[0].windows == (0, 0, 0)


def test_tensors_must_fit_the_config(tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    name = "model.layers.1.mlp.down_proj.weight"

    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors.items() if key != name}

    with pytest.raises(DamagedWeights, match=name) as error:
        describe_model(checkpoint.config, without(checkpoint.tensors))
    one_line(error)
    with pytest.raises(
        DamagedWeights, match=r"gate_proj.weight' has shape \[160, 96\]; its config requires \[192, 96\]"
    ):
        describe_model(checkpoint.config | {"intermediate_size": 192}, checkpoint.tensors)
    with pytest.raises(UnsupportedModel, match=r"q_norm\.weight' that a model with its config does not use"):
        extra = Tensor("model.layers.0.self_attn.q_norm.weight", (32,), "F32", np.zeros((1, 128), np.uint8))
        describe_model(checkpoint.config, {**checkpoint.tensors, extra.name: extra})
    strange = Tensor(name, (96, 160), "F8_E4M3", np.zeros((96, 160), np.uint8))
    with pytest.raises(UnsupportedModel, match="F8_E4M3; supported are F32") as refused:
        describe_model(checkpoint.config, checkpoint.tensors | {name: strange})
    one_line(refused)

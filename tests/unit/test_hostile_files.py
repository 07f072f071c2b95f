"""Names and files that are not what they should be: one line at once, and little memory."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import complaint
from octavo.errors import DamagedWeights, ModelNotFound, OctavoError, UnsupportedModel
from octavo.weights import generation_defaults, open_checkpoint, resolve

INDEX = "model.safetensors.index.json"


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "model"))


def refuse(action: Callable[[], object], kind: type[OctavoError], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        action()
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000


# What is not a regular file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.timeout(20, func_only=True)
@pytest.mark.parametrize("make", [fifo, device, folder])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, "generation_config.json"])
def test_what_is_not_a_regular_file(name: str, make: Callable[[Path], None], tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    (model / name).unlink(missing_ok=True)
    make(model / name)
    read = generation_defaults if name == "generation_config.json" else open_checkpoint
    refuse(lambda: read(model), ModelNotFound, f"{name} is not a regular file")


@pytest.mark.timeout(20, func_only=True)
@pytest.mark.parametrize("make", [fifo, device, folder])
def test_a_shard_that_is_not_a_regular_file(
    make: Callable[[Path], None], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = copied(tiny_model("qwen2"), tmp_path)
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.unlink()
    make(shard)
    refuse(lambda: open_checkpoint(model), ModelNotFound, "is not a regular file")


@pytest.mark.timeout(20, func_only=True)
def test_gguf_files_that_are_not_regular(tmp_path: Path) -> None:
    fifo(tmp_path / "a.gguf")
    refuse(lambda: resolve(str(tmp_path / "a.gguf")), UnsupportedModel, r"is not a \.gguf file")
    refuse(lambda: open_checkpoint(tmp_path / "a.gguf"), ModelNotFound, "is not a regular file")


def test_links_in_a_circle(tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")
    refuse(lambda: open_checkpoint(model), ModelNotFound, "model.safetensors")
    (tmp_path / "circle.gguf").symlink_to("circle.gguf")
    refuse(lambda: resolve(str(tmp_path / "circle.gguf")), ModelNotFound, "circle")


@pytest.mark.timeout(60, func_only=True)
def test_the_command_does_not_wait_for_a_fifo(tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    (model / "model.safetensors").unlink()
    fifo(model / "model.safetensors")
    assert "is not a regular file" in complaint("generate", model, "hello")


# Sizes


@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json"])
def test_files_of_10_gigabytes(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    with (model / name).open("wb") as file:
        file.truncate(10 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = generation_defaults if name == "generation_config.json" else open_checkpoint
    refuse(lambda: read(model), DamagedWeights, f"{name} is larger than")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_safetensors_header_of_gigabytes(tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    with (model / "model.safetensors").open("wb") as file:
        file.write((8 << 30).to_bytes(8, "little"))
        file.truncate(10 << 30)
    refuse(lambda: open_checkpoint(model), DamagedWeights, "header claims 8589934592 bytes")


def test_one_name_twice_in_a_safetensors_header(tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}'
    )
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refuse(lambda: open_checkpoint(model), DamagedWeights, "two tensors have the same name|duplicate|damaged")


# Content


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe\xfa", b"", b"[]", b'{"a": 1' + b"0" * 5000]
)
def test_json_that_is_none(name: str, content: bytes, tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    (model / name).write_bytes(content)
    refuse(lambda: open_checkpoint(model), DamagedWeights, name)


def test_a_byte_order_mark_is_no_damage(tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    content = (model / "config.json").read_bytes()
    (model / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert open_checkpoint(model).config == json.loads(content)


# Names


@pytest.mark.parametrize(
    "name",
    [
        "x" * 5000,
        "x" * 2500 + "/" + "y" * 2500,
        "/" + "d/" * 3000 + "x.gguf",
        "~no-such-user/x",
        "a\0b",
        "",
        "é" * 200 + "/" * 9,
    ],
)
def test_names_that_no_path_can_have(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name:
        refuse(lambda: resolve(name), ModelNotFound, ".")


def test_long_names_on_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    assert "x" * 50 in complaint("pull", "x" * 5000)
    assert "x" * 50 in complaint("generate", "x" * 5000, "hello")
    assert "cannot write" in complaint("quantize", tiny_llama, tmp_path / ("x" * 5000))
    assert "choose another directory" in complaint("quantize", tiny_llama, "/")


def test_names_below_a_file(tiny_llama: Path) -> None:
    refuse(lambda: resolve(str(tiny_llama / "config.json" / "x")), ModelNotFound, "no model")
    refuse(lambda: open_checkpoint(tiny_llama / "config.json" / "x.gguf"), ModelNotFound, "cannot read")

"""Encrypted models: what comes out is what went in, and whatever was changed is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyrage
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from octavo.errors import ConfigError, DamagedWeights, ModelNotFound, OctavoError
from octavo.formats.encrypted_model import EncryptedMap, EncryptedPath
from octavo.formats.files import MANIFEST, ModelPath, unlock
from octavo.text import Tokenizer
from octavo.weights import fingerprint, generation_defaults, open_checkpoint
from octavo.weights.encrypting import encrypt_model

IDENTITY = pyrage.x25519.Identity.generate()
CHUNK = 65_536  # of age


def encrypt(path: Path, folder: Path, *recipients: str) -> Path:
    folder.mkdir()
    encrypt_model(path, folder, recipients or [str(IDENTITY.to_public())], lambda done, total: None)
    return folder


def opened(folder: Path) -> ModelPath:
    return unlock(folder, str(IDENTITY))


@pytest.fixture(scope="module")
def sharded(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in several files, and its encryption."""
    plain = tiny_model("qwen2")
    return plain, encrypt(plain, tmp_path_factory.mktemp("sharded") / "model.age")


def load(path: ModelPath) -> None:
    """Read all that an engine and its frontend read."""
    Tokenizer.load(path)
    generation_defaults(path)
    checkpoint = open_checkpoint(path)
    for tensor in checkpoint.tensors.values():
        tensor.check_finite()
    checkpoint.verify()


def assert_same(plain: Path, encrypted: ModelPath) -> None:
    ours, theirs = open_checkpoint(encrypted), open_checkpoint(plain)
    assert ours.config == theirs.config
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert np.array_equal(ours.tensors[name].data, tensor.data), name
    ours.verify()
    assert fingerprint(ours) == fingerprint(theirs)
    assert generation_defaults(encrypted) == generation_defaults(plain)
    assert Tokenizer.load(encrypted).encode("modules and classes") == Tokenizer.load(plain).encode(
        "modules and classes"
    )
    assert Tokenizer.load(encrypted)._template == Tokenizer.load(plain)._template


def test_a_directory_comes_back(sharded: tuple[Path, Path]) -> None:
    plain, folder = sharded
    assert len(list(folder.glob("*.safetensors.age"))) > 1
    assert_same(plain, opened(folder))


def test_a_gguf_file_comes_back(smollm2: Path, tmp_path: Path) -> None:
    folder = encrypt(smollm2, tmp_path / "model.age")
    path = opened(folder)
    assert path.suffix == ".gguf"
    assert_same(smollm2, path)
    assert not any(b"general.architecture" in file.read_bytes() for file in folder.iterdir())


def test_a_tensor_that_was_released_is_decrypted_again(sharded: tuple[Path, Path]) -> None:
    plain, folder = sharded
    ours, theirs = open_checkpoint(opened(folder)), open_checkpoint(plain)
    for _ in range(2):
        for name, tensor in ours.tensors.items():
            assert np.array_equal(tensor.data, theirs.tensors[name].data), name
            tensor.release()


def test_memory_is_freed_as_tensors_are_released(smollm2: Path, tmp_path: Path) -> None:
    path = opened(encrypt(smollm2, tmp_path / "model.age"))
    assert isinstance(path, EncryptedPath)
    checkpoint = open_checkpoint(path)
    [mapped] = path.model._maps
    before = used(mapped)
    assert before < 8 << 20, "only the header is decrypted before a weight is read"
    for tensor in checkpoint.tensors.values():
        assert tensor.data.size
        tensor.release()
    checkpoint.verify()
    assert used(mapped) < 16 << 20 < smollm2.stat().st_size


def used(mapped: EncryptedMap) -> int:
    return os.stat(mapped.path).st_blocks * 512  # noqa: PTH116


def test_a_changed_byte_anywhere_is_refused(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = sharded
    for file in folder.iterdir():
        content = file.read_bytes()
        middle = range(0, len(content), max(1, len(content) // 7))
        for position in {*middle, 40, 250, len(content) - 1, len(content) // CHUNK * CHUNK}:
            copy = shutil.copytree(folder, tmp_path / "copy")
            changed = bytearray(content)
            changed[position] ^= 1
            (copy / file.name).write_bytes(changed)
            with pytest.raises(DamagedWeights) as error:
                load(opened(copy))
            assert file.name in str(error.value) and "\n" not in str(error.value)
            shutil.rmtree(copy)


def test_a_cut_file_is_refused(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = sharded
    for file in folder.iterdir():
        header = file.read_bytes().index(b"\n--- ") + 49  # the header ends with a MAC of 43 characters
        sizes = {0, 100, header, header + 16, file.stat().st_size - 1}
        sizes |= {header + 16 + (CHUNK + 16) * i for i in range(1, (file.stat().st_size - header) // CHUNK)}
        for size in sizes:
            copy = shutil.copytree(folder, tmp_path / "copy")
            os.truncate(copy / file.name, size)
            with pytest.raises(DamagedWeights):
                load(opened(copy))
            shutil.rmtree(copy)


def test_files_of_another_model_for_the_same_recipient_are_refused(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    plain, folder = sharded
    other = encrypt(plain, tmp_path / "other.age")  # even of the same content
    for name in ("model.safetensors.index.json.age", next(folder.glob("*.safetensors.age")).name, "config.json.age"):
        copy = shutil.copytree(folder, tmp_path / "copy")
        shutil.copy(other / name, copy / name)
        with pytest.raises(DamagedWeights, match="changed, cut or replaced"):
            load(opened(copy))
        shutil.rmtree(copy)
    one, two = sorted(folder.glob("*.safetensors.age"))[:2]
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(one, copy / two.name)
    with pytest.raises(DamagedWeights, match="changed, cut or replaced"):
        load(opened(copy))


def test_a_missing_file_is_named(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(sharded[1], tmp_path / "copy")
    (copy / "tokenizer.json.age").unlink()
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        load(opened(copy))


def test_any_recipient_opens_it_and_nobody_else(tiny_llama: Path, tmp_path: Path) -> None:
    other = pyrage.x25519.Identity.generate()
    key = Ed25519PrivateKey.generate()
    ssh = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    private_ssh = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    folder = encrypt(tiny_llama, tmp_path / "model.age", str(IDENTITY.to_public()), str(other.to_public()), ssh)
    for identity in (f"# a comment\n{IDENTITY}\n", str(other), private_ssh):
        load(unlock(folder, identity.strip()))
    with pytest.raises(DamagedWeights, match="cannot be opened with this identity"):
        unlock(folder, str(pyrage.x25519.Identity.generate()))
    with pytest.raises(ConfigError, match="--model-identity"):
        unlock(folder, None)
    for wrong in ("", "AGE-SECRET-KEY-1QQQ", "-----BEGIN OPENSSH PRIVATE KEY-----\nno"):
        with pytest.raises(ConfigError, match="no usable identity") as error:
            unlock(folder, wrong)
        assert "QQQ" not in str(error.value)


def test_what_is_no_recipient_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for wrong in ("age1xyz", str(IDENTITY.to_public())[:-1], "ssh-ed25519 AAAA", "ssh-dss x"):
        with pytest.raises(ConfigError, match="is no recipient"):
            encrypt(tiny_llama, tmp_path / wrong.split()[0], wrong)


def test_a_model_that_cannot_be_loaded_is_not_encrypted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(OctavoError):
        encrypt(tmp_path / "model", tmp_path / "model.age")
    assert not (tmp_path / "model.age" / MANIFEST).exists()

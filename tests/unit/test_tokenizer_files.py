"""Files of tokenizers that are damaged, made to do harm, or not supported."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import gguf
import pytest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models

from octavo.errors import DamagedWeights, ModelNotFound, UnsupportedModel
from octavo.text import Tokenizer
from tiny_gguf import finish_vocabulary


def no_tokens(metadata: gguf.GGUFWriter) -> None:
    metadata.add_tokenizer_model("gpt2")


def a_merge_of_unknown_tokens(metadata: gguf.GGUFWriter) -> None:
    metadata.add_tokenizer_model("gpt2")
    metadata.add_token_list(["a", "b"])
    metadata.add_token_merges(["x y"])


def the_same_token_twice(metadata: gguf.GGUFWriter) -> None:
    metadata.add_tokenizer_model("gpt2")
    metadata.add_token_list(["a", "b", "ab", "a"])
    metadata.add_token_merges(["a b"])


def bos_out_of_range(metadata: gguf.GGUFWriter) -> None:
    metadata.add_tokenizer_model("gpt2")
    metadata.add_token_list(["a", "b", "ab"])
    metadata.add_token_merges(["a b"])
    metadata.add_add_bos_token(True)
    metadata.add_bos_token_id(7)


def fewer_scores_than_tokens(metadata: gguf.GGUFWriter) -> None:
    metadata.add_tokenizer_model("llama")
    metadata.add_token_list(["a", "b", "ab"])
    metadata.add_token_scores([0.0])


@pytest.mark.parametrize(
    "damage",
    [no_tokens, a_merge_of_unknown_tokens, the_same_token_twice, bos_out_of_range, fewer_scores_than_tokens],
)
def test_damaged_vocabulary(tmp_path: Path, damage: Callable[[gguf.GGUFWriter], None]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    damage(writer)
    with pytest.raises(DamagedWeights, match=r"model\.gguf is damaged") as caught:
        Tokenizer.load(finish_vocabulary(writer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model, pre", [("bert", "default"), ("gpt2", "kimi-k2")])
def test_unsupported_vocabulary(tmp_path: Path, model: str, pre: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "b"])
    with pytest.raises(UnsupportedModel):
        Tokenizer.load(finish_vocabulary(writer))


def test_damaged_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(DamagedWeights, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)


def tokenizer_files(source: Path, folder: Path) -> dict[str, bytes]:
    """Copy a tokenizer with every optional file into `folder`; return what the files hold."""
    content = {file.name: file.read_bytes() for file in source.glob("tokenizer*.json")}
    content["tokenizer.json"] = content["tokenizer.json"].replace(b"\n", b" ")
    content["generation_config.json"] = b'{"eos_token_id": [1, 0], "bos_token_id": 0}'
    content["config.json"] = b'{"eos_token_id": 2}'
    content["chat_template.jinja"] = "{{ messages }} \N{GRINNING FACE}".encode()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return content


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b"[" * 100_000),
        ("generation_config.json", b'{"a":' * 100_000),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b'{"added_tokens":' * 100_000),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"bos_token": 5}'),
        ("tokenizer_config.json", b'{"eos_token": {"content": ["x"]}}'),
        ("tokenizer_config.json", b'{"chat_template": 7}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": [], "template": "x"}]}'),
        ("tokenizer_config.json", b'{"a": ' + b"1" * 5000 + b"}"),
        ("chat_template.jinja", b"caf\xe9"),
    ],
)
def test_damaged_files_are_one_line(tiny_llama: Path, tmp_path: Path, name: str, content: bytes) -> None:
    tokenizer_files(tiny_llama, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedWeights, match=rf"{name} is damaged") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_only_regular_files_of_bounded_size_are_read(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    tokenizer_files(tiny_llama, tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.truncate(10 << 30)  # sparse
    with pytest.raises(DamagedWeights, match="is larger than"):
        Tokenizer.load(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelNotFound, match="not a regular file"):
        Tokenizer.load(tmp_path)


def test_mutated_files_load_or_are_refused_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    content = tokenizer_files(tiny_llama, tmp_path)
    values = ["null", "7", "-1", "1e999", '"x"', "[]", "{}", '[["x"]]', "true", "4294967296", '"\\ud800"']
    random = Random(9)
    for _ in range(100):
        name = random.choice(list(content))
        data = bytearray(content[name])
        at = random.randrange(len(data))
        match random.randrange(4):
            case 0:
                data[at] = random.randrange(256)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + random.randrange(1, 20)]
            case _:  # another value for a key
                keys = [match.end() for match in re.finditer(rb'": ?', data)] or [0]
                at = random.choice(keys[: random.choice([30, len(keys)])])
                end = re.compile(rb"[,}\]]").search(data, at)
                data[at : end.start() if end else at] = random.choice(values).encode()
        (tmp_path / name).write_bytes(data)
        try:
            ours = Tokenizer.load(tmp_path)
            assert isinstance(ours.decode(ours.encode("hello <s> ü")), str) and ours.min_tokens("hello") >= 0
        except (DamagedWeights, UnsupportedModel) as error:
            assert "\n" not in str(error)
        (tmp_path / name).write_bytes(content[name])


def test_ids_beyond_the_vocabulary_of_the_model(tiny_llama: Path) -> None:
    ours = Tokenizer.load(tiny_llama)
    ours.check_vocabulary(ours.vocab_size)
    with pytest.raises(DamagedWeights, match=f"has the id {ours.vocab_size - 1}, but the model's vocabulary ends at"):
        ours.check_vocabulary(ours.vocab_size - 1)


def test_a_vocabulary_without_a_pre_tokenizer_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    assert Tokenizer.load(finish_vocabulary(writer)).encode("ab") == [2]
    [record] = caplog.records
    assert record.levelname == "WARNING" and "tokenizer.ggml.pre" in record.getMessage()


def test_unsupported_decoder(tmp_path: Path) -> None:
    backend = BackendTokenizer(models.WordPiece({"[UNK]": 0}))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        Tokenizer.load(tmp_path)

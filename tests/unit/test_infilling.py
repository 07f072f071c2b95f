"""Prompts to fill in the middle, against the formats of the models' authors."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from octavo.errors import InvalidRequest, PromptTooLong
from octavo.text import Tokenizer
from octavo.text.infilling import infill
from tiny_models import real_text, save_tokenizer

PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))  # 漢字\n"

# From the model cards of Qwen2.5-Coder, StarCoder, SantaCoder and DeepSeek-Coder.
CARDS = {
    "qwen": "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
    "starcoder": "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
    "santacoder": "<fim-prefix>{prefix}<fim-suffix>{suffix}<fim-middle>",
    "deepseek": "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",
}


@pytest.mark.parametrize("family", CARDS)
def test_byte_level_families(tmp_path: Path, family: str) -> None:
    marks = CARDS[family].replace("{prefix}", " ").replace("{suffix}", " ").split()
    save_tokenizer(tmp_path, *marks, "<|file_sep|>", "<file_sep>")
    ours, theirs = Tokenizer.load(tmp_path), BackendTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for prefix, suffix in [(PREFIX, SUFFIX), ("", SUFFIX), (" x", "")]:
        ids, ends = infill(ours, prefix, suffix)
        assert ids == theirs.encode(CARDS[family].format(prefix=prefix, suffix=suffix)).ids
    names = {"qwen": ["<|endoftext|>", "<|file_sep|>"], "starcoder": ["<file_sep>", "<|endoftext|>"]}
    names |= {"santacoder": ["<|endoftext|>"], "deepseek": []}
    assert sorted(ends) == sorted(theirs.token_to_id(name) for name in names[family])


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary that puts a space before a text, with BOS and the marks of Code Llama and Codestral."""
    backend = BackendTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    marks = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "[PREFIX]", "[SUFFIX]"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<unk>", "<s>", "</s>", *bytes_, *marks], show_progress=False
    )
    backend.train_from_iterator(real_text()[:100_000].splitlines(), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("spm")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(tokenizer.token_bytes(i) for i in ids).decode()


def test_code_llama(sentencepiece_like: Tokenizer) -> None:
    """BOS, ▁<PRE>, the prefix, ▁<SUF>, the suffix without a space before it, ▁<MID>."""
    ids, ends = infill(sentencepiece_like, PREFIX, SUFFIX)
    bos, pre, suf, mid, eot = (
        sentencepiece_like.backend.token_to_id(name) for name in ("<s>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    )
    at = ids.index(suf)
    assert (ids[:2], ids[-1], ends) == ([bos, pre], mid, [eot])
    assert ids[2:at] == sentencepiece_like.encode(PREFIX, add_special_tokens=False)
    assert spelled(sentencepiece_like, ids[at + 1 : -1]) == SUFFIX


def test_codestral(sentencepiece_like: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """BOS, [SUFFIX], the suffix without a space before it, [PREFIX], the prefix."""
    names = {"[PREFIX]", "[SUFFIX]"}
    known = sentencepiece_like.special_id
    monkeypatch.setattr(sentencepiece_like, "special_id", lambda name: known(name) if name in names else None)
    ids, ends = infill(sentencepiece_like, PREFIX, SUFFIX)
    at = ids.index(sentencepiece_like.backend.token_to_id("[PREFIX]"))
    assert (ids[:2], ends) == ([1, sentencepiece_like.backend.token_to_id("[SUFFIX]")], [])
    assert spelled(sentencepiece_like, ids[2:at]) == SUFFIX
    assert ids[at + 1 :] == sentencepiece_like.encode(PREFIX, add_special_tokens=False)


def test_limits(tiny_llama: Path, sentencepiece_like: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="tokens to fill in the middle"):
        infill(Tokenizer.load(tiny_llama), "a", "b")
    for prefix, suffix in [("word " * 100, "b"), ("a", "word " * 100)]:
        with pytest.raises(PromptTooLong):
            infill(sentencepiece_like, prefix, suffix, max_tokens=20)

"""The lower bound of a text's tokens, and tokenizing in pieces, against tokenizing it as a whole."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from octavo.errors import InvalidRequest, PromptTooLong
from octavo.text import Tokenizer, tokenizer
from octavo.text.gguf_vocabulary import WORD_REGEXES
from octavo.text.offload import off_loop
from octavo.text.tokenizer import PIECE
from tiny_models import real_text

SAMPLES = [
    "a",
    "the ",
    " the",
    "  ",
    "\n\n \n",
    "123",
    "z q ",
    "hello world",
    "it's",
    "<s>",
    "<pad>",
    " <pad>  ",
    "▁",
    "🎉👩‍👧",
    "你好",
    "ü",
]
SAMPLES += [
    "e\u0301",
    "\u0301",
    "\u1100\u1161\u11a8",
    "\u212b",
    "\u1fef",
    "\u2126 ",
    "\xa0",
    "\u3000",
    "\x00",
    "<0x41>",
    "!!!",
    "---",
]
TEXTS = st.lists(st.one_of(st.sampled_from(SAMPLES), st.text(max_size=6)), max_size=30).map("".join)
ADDED = [AddedToken("<s>"), AddedToken("new-line ", normalized=False), AddedToken("<pad>", lstrip=True, rstrip=True)]


def trained(backend: Backend, size: int, **options: object) -> Backend:
    trainer = {models.BPE: trainers.BpeTrainer, models.Unigram: trainers.UnigramTrainer}[type(backend.model)]
    backend.train_from_iterator([real_text()[:60_000]], trainer(vocab_size=size, show_progress=False, **options))
    return backend


def byte_level(regex: str | None = None, normalizer: object = None, alphabet: bool = True) -> Backend:
    backend = Backend(models.BPE())
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=regex is None)])
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    return trained(backend, 600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [])


def sentencepiece(byte_fallback: bool, metaspace: bool = False) -> Backend:
    names = ["<unk>", *(f"<0x{n:02X}>" for n in range(256))] if byte_fallback else ["<unk>"]
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # Words are cut for training only: otherwise one "word" of the whole text is trained on.
    text = real_text()[:20_000].replace(" ", "\n▁").splitlines()
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False))
    return backend


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return trained(backend, 300, unk_token="<unk>", special_tokens=["<unk>"])


def lossy() -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.Replace("a", ""), normalizers.Strip()])
    return backend


BACKENDS: dict[str, Callable[[], Backend]] = {
    "gpt-2": byte_level,
    "regex": lambda: byte_level(sorted(WORD_REGEXES)[0]),
    "nfc": lambda: byte_level(sorted(WORD_REGEXES)[-1], normalizers.NFC()),
    "without an alphabet": lambda: byte_level(alphabet=False),
    "byte fallback": lambda: sentencepiece(True),
    "unknown characters": lambda: sentencepiece(False),
    "metaspace": lambda: sentencepiece(True, metaspace=True),
    "unigram": unigram,
    "lossy": lossy,
}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.mark.parametrize("added", [[], ADDED[:2], ADDED])
def test_never_above_the_number_of_tokens(backend: Backend, added: list[AddedToken]) -> None:
    copy = Backend.from_str(backend.to_str())
    copy.add_tokens(added)
    ours = Tokenizer(copy)

    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        tokens = len(copy.encode(text, add_special_tokens=False).ids)
        assert ours.min_tokens(text) <= tokens
        assert ours.encode(text, max_tokens=tokens, add_special_tokens=False) is not None

    check()


@pytest.mark.parametrize("name", ["gpt-2", "nfc", "byte fallback"])
def test_near_the_number_of_tokens_of_real_text(name: str) -> None:
    ours, text = Tokenizer(BACKENDS[name]()), real_text()[:200_000]
    assert ours.min_tokens(text) > 0.25 * len(ours.encode(text))
    assert ours.min_tokens("z q " * 100_000) > 100_000
    assert 1000 < ours.min_tokens(text, enough=1000) < 60_000


@pytest.mark.parametrize("name", ["gpt-2", "regex", "nfc", "byte fallback"])
def test_pieces_have_the_tokens_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PIECE", 3)
    whole = BACKENDS[name]()
    whole.add_tokens(ADDED)
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A <pad>", special_tokens=[("<s>", 7), ("<pad>", 9)]
    )
    ours = Tokenizer(whole)
    pieces = 0

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    @example("one two three four")
    def check(text: str) -> None:
        nonlocal pieces
        pieces = max(pieces, len(list(ours._pieces(text))))
        assert ours.encode(text) == whole.encode(text).ids
        assert ours.encode(text, owner="tenant") == ours.encode(text, owner="tenant") == whole.encode(text).ids
        assert ours.encode(text, add_special_tokens=False) == whole.encode(text, add_special_tokens=False).ids

    check()
    assert (pieces > 1) == (name != "byte fallback")


def test_texts_with_too_many_tokens_are_refused() -> None:
    ours = Tokenizer(byte_level())
    text = "it is so. " * 50
    count = len(ours.encode(text))
    assert len(ours.encode(text, max_tokens=count)) == count
    for long in (text, text * 100_000):  # the second has 50 MB: tokenizing it would take a minute
        with pytest.raises(PromptTooLong, match=f"more than {count - 1} tokens"):
            ours.encode(long, max_tokens=count - 1)
    with pytest.raises(InvalidRequest, match="lone surrogate at character 1"):
        ours.min_tokens("a\ud800")


def test_long_texts_leave_the_event_loop_alone() -> None:
    """While a long text is tokenized, the loop turns; a short one is tokenized at once."""
    ours = Tokenizer(byte_level())
    text = "z q " * 50_000

    async def main() -> int:
        long = asyncio.ensure_future(off_loop(ours, len(text), lambda: ours.encode(text)))
        turns = 0
        while not long.done():
            turns += 1
            await asyncio.sleep(0)
        assert await long == ours.encode(text)
        with pytest.raises(PromptTooLong):
            await off_loop(ours, len(text), lambda: ours.encode(text, max_tokens=100))
        return turns

    assert asyncio.run(main()) > 100
    here = asyncio.run(off_loop(ours, 2, threading.current_thread))
    assert here is threading.current_thread()


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    """They are left from training; transformers ignores them as well."""
    backend = byte_level()
    expected = backend.encode("hello world").ids
    backend.enable_truncation(2)
    backend.enable_padding(length=100)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    assert Tokenizer.load(tmp_path).encode("hello world") == expected


def test_beginnings_are_remembered_for_their_owner() -> None:
    ours, text = Tokenizer(byte_level()), real_text()[:20_000]
    encoded: list[str] = []
    encode = ours._encode
    ours._encode = lambda piece: encoded.append(piece) or encode(piece)  # type: ignore[method-assign]
    expected = ours.encode(text)
    for owner, again in [("a", False), ("a", True), ("b", False), (None, False), (None, False)]:
        encoded.clear()
        assert ours.encode(text + " and more", owner=owner)[: len(expected)] == expected
        assert sum(map(len, encoded)) <= 2 * PIECE if again else "".join(encoded) == text + " and more"

"""Compute a lower bound of the number of tokens in a text without tokenizing it. The proof is in docs/text.md."""

import json
import re
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import models

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_CHUNK = 1 << 16  # characters processed at a time
_HOLE = 0xFF  # a byte that UTF-8 never has; stands for text that normalization may change
_SPACE = "▁"  # stands for a space in SentencePiece vocabularies


class TokenBound:
    """Computes a lower bound of the number of tokens in a text.

    Tokens cover the bytes of a text without overlap. So each byte b counts for at least 1 / (bytes of the longest token
    that contains b). If no token contains two bytes next to each other, a token boundary lies between them wherever
    they occur in this order. Bytes that may vanish or change before they are tokenized count for nothing.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        """Analyze the vocabulary. This takes tenths of a second for the largest vocabularies."""
        backend = tokenizer.backend
        self._steps = component_steps(backend.normalizer) + component_steps(backend.pre_tokenizer)
        self._exists = _keeps_text(self._steps, backend.model)
        if not self._exists:
            return
        kinds = {step["type"] for step in self._steps}
        self._composes = "NFC" in kinds
        self._writes_spaces = bool(kinds & {"Metaspace", "Replace"})
        vocabulary = backend.get_vocab(with_added_tokens=True)
        spellings = self._spellings(tokenizer, vocabulary)
        self._joined = _neighbors(spellings)
        self._weights = np.where(
            self._certain(tokenizer, vocabulary, "ByteLevel" in kinds), 1 / _longest(spellings), 0.0
        )
        nothing = self._weights == 0
        self._joined |= nothing[:, None] | nothing[None, :]

    def __call__(self, text: str, enough: int) -> int:
        """Return a lower bound of the number of tokens in `text`. Counting may stop beyond `enough`."""
        if not self._exists:
            return 0
        changes = self._composes and not text.isascii()
        complete, begun = 0, 0.0  # tokens of the complete segments; weight of the last segment, which may continue
        before = _HOLE
        for start in range(0, len(text), _CHUNK):
            data = self._bytes(text[start : start + _CHUNK], changes)
            starts = np.flatnonzero(~self._joined[np.concatenate(([before], data[:-1])), data])
            ends = np.cumsum(self._weights[data])
            sums = np.diff(np.concatenate(([0.0], ends))[np.concatenate(([0], starts, [data.size]))])
            sums[0] += begun
            complete += int(_at_least(sums[:-1]).sum())
            begun, before = float(sums[-1]), int(data[-1])
            if complete + begun > enough + 1:
                break
        return complete + int(_at_least(begun))

    def _bytes(self, text: str, changes: bool) -> npt.NDArray[np.uint8]:
        if self._writes_spaces:
            text = text.replace(_SPACE, " ")
        if changes:
            # The last character counts for nothing: the next one may be a mark that is composed with it.
            text = _changeable().sub("\udcff", text[:-1]) + "\udcff"
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)

    def _spellings(self, tokenizer: "Tokenizer", vocabulary: dict[str, int]) -> list[bytes]:
        """Return all byte strings that tokens may stand for in a text."""
        plain = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
        plain += [name for name in vocabulary if name.startswith("<0x")]
        plain += [unicodedata.normalize("NFC", content) for content in plain]
        if self._writes_spaces:
            plain = [content.replace(_SPACE, " ") for content in plain]
        spellings = [tokenizer.token_bytes(token) for token in vocabulary.values()]
        return [spelling for spelling in spellings + [content.encode() for content in plain] if spelling]

    def _certain(self, tokenizer: "Tokenizer", vocabulary: dict[str, int], byte_level: bool) -> npt.NDArray[np.bool_]:
        """Return for each byte whether it always becomes part of a token at its place.

        This is not so for unknown characters, which may vanish or be merged into one token, nor for white space next to
        a token with `lstrip` or `rstrip`, which absorbs any amount of it.
        """
        backend = tokenizer.backend
        added = backend.get_added_tokens_decoder()
        certain = np.zeros(256, dtype=bool)
        if byte_level:
            alphabet = [token for name, token in vocabulary.items() if len(name) == 1 and token not in added]
            certain[[tokenizer.token_bytes(token)[0] for token in alphabet]] = True
        elif getattr(backend.model, "byte_fallback", False) and all(f"<0x{n:02X}>" in vocabulary for n in range(256)):
            certain[:] = True
        else:
            space = _SPACE if self._writes_spaces else " "
            names = [space if code == ord(" ") else chr(code) for code in range(128)]
            certain[:128] = [name in vocabulary and vocabulary[name] not in added for name in names]
        if any(token.lstrip or token.rstrip for token in added.values()):
            certain[: ord(" ") + 1] = certain[0x7F:] = False
        certain[_HOLE] = False
        return certain


def _at_least(weight: Any) -> Any:
    return np.maximum(np.ceil(weight - 1e-6), 0)


def _longest(spellings: list[bytes]) -> npt.NDArray[np.float64]:
    """Return for each byte the length of the longest token that contains it."""
    lengths = np.array([len(spelling) for spelling in spellings])
    longest = np.ones(256)
    np.maximum.at(longest, np.frombuffer(b"".join(spellings), np.uint8), np.repeat(lengths, lengths))
    return longest


def _neighbors(spellings: list[bytes]) -> npt.NDArray[np.bool_]:
    """Return for each pair of bytes whether they occur next to each other in a token."""
    data = np.frombuffer(b"".join(spellings), np.uint8)
    inside = np.ones(len(data), dtype=bool)  # whether a byte continues a token
    inside[np.cumsum([0] + [len(spelling) for spelling in spellings[:-1]])] = False
    neighbors = np.zeros((256, 256), dtype=bool)
    neighbors[data[:-1][inside[1:]], data[1:][inside[1:]]] = True
    return neighbors


def component_steps(component: Any) -> list[dict[str, Any]]:
    """Return a normalizer or pre-tokenizer as the list of its steps, as tokenizer.json has them."""

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        parts = step.get("normalizers", step.get("pretokenizers"))
        return [step] if parts is None else [one for part in parts for one in flat(part)]

    return flat(json.loads(component.__getstate__())) if component else []


def _keeps_text(steps: list[dict[str, Any]], model: Any) -> bool:
    """Return whether all steps are known to lose no text, so that the tokens cover the whole text."""
    if not isinstance(model, (models.BPE, models.Unigram)):
        return False
    if getattr(model, "continuing_subword_prefix", None) or getattr(model, "end_of_word_suffix", None):
        return False
    return all(_keeps(step) for step in steps)


def _keeps(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return bool(behavior != "Removed")
        case {"type": "Replace", "pattern": {"String": " "}, "content": content}:
            return bool(content == _SPACE)
        case {"type": "Metaspace", "replacement": replacement}:
            return bool(replacement == _SPACE)
        case {"type": kind}:
            return kind in ("ByteLevel", "Digits", "Prepend", "NFC")
        case _:
            return False


@lru_cache(maxsize=1)
def _changeable() -> re.Pattern[str]:
    """Return a pattern of text that NFC may change: characters that it changes or composes, and the one before them.

    Above U+FFFF, all characters but emoji and ideographs count, since this Python may know an older Unicode than the
    tokenizer.
    """
    changeable = {code for code in range(0x80, 0x10000) if not 0xD800 <= code < 0xE000 and _changes(chr(code))}
    for code in range(0x80, 0x10000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            changeable.add(int(parts[1], 16))
    changeable |= {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}  # vowels and final consonants of Hangul
    ranges = "".join(f"\\u{code:04x}" for code in sorted(changeable))
    return re.compile(f"(?s:.)?[{ranges}\U00010000-\U0001efff\U0002f800-\U0010ffff]+")


def _changes(character: str) -> bool:
    unknown = unicodedata.category(character) == "Cn"
    return unknown or unicodedata.combining(character) > 0 or unicodedata.normalize("NFC", character) != character

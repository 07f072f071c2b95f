"""Tokenizers made from GGUF metadata, which have a vocabulary but no tokenizer.json.

`tokenizer.ggml.pre` names the rules by which text is split before merging. These rules are defined only in llama.cpp's
src/llama-vocab.cpp.
"""

import logging
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from octavo.errors import DamagedWeights, UnsupportedModel, shortened

_log = logging.getLogger("octavo")

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_WORDS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _WORDS_AND_SPACES
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _WORDS_AND_SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

WORD_REGEXES = frozenset([_LLAMA3, _QWEN2, _TEKKEN])


@dataclass(frozen=True)
class _Style:
    """The rules by which text is split for a byte-level vocabulary."""

    split: str | None = None  # a regular expression; None: that of GPT-2, which is built into the tokenizers library
    single_digits: bool = False
    whole_words: bool = False  # a word that is in the vocabulary is one token, even if no merges lead to it
    add_bos: bool = False  # the default if the file does not say
    nfc: bool = False


_STYLES = {
    name: style
    for style, names in {
        _Style(): "default gpt-2 olmo mpt jais exaone4",
        _Style(single_digits=True): "smollm starcoder refact command-r codeshell exaone minerva-7b",
        _Style(_LLAMA3, whole_words=True, add_bos=True): "llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0 lfm2",
        _Style(_LLAMA3): "dbrx smaug-bpe",
        _Style(_QWEN2, nfc=True): "qwen2 deepseek-r1-qwen megrez",
        _Style(_TEKKEN, whole_words=True, add_bos=True): "tekken",
    }.items()
    for name in names.split()
}


def tokenizer_from_metadata(metadata: dict[str, Any], source: str) -> Tokenizer:
    """Return the tokenizer that `metadata` describes.

    Args:
        source: The file's name, for errors.

    Raises:
        UnsupportedModel: The vocabulary is neither byte-level nor SentencePiece's BPE, or its `pre` is unknown.
        DamagedWeights: The vocabulary is inconsistent.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            f"{source} has a vocabulary of type {shortened(kind, 40)!r}; supported are 'gpt2' and 'llama'"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise DamagedWeights(f"{source} is damaged: it has no tokenizer.ggml.tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise DamagedWeights(f"{source} is damaged: its vocabulary has the same token twice")
    try:
        if kind == "gpt2":
            tokenizer, add_bos = _byte_level(metadata, vocabulary, source)
        else:
            tokenizer, add_bos = _sentencepiece(metadata, vocabulary), True
        _add_special_tokens(tokenizer, metadata, tokens)
        _add_template(tokenizer, metadata, tokens, add_bos)
    except UnsupportedModel:
        raise
    except BaseException as error:  # Exception for damage; Rust's panics are not subclasses of Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DamagedWeights(f"{source} is damaged: its vocabulary is inconsistent ({shortened(error)})") from None
        raise
    return tokenizer


def _byte_level(metadata: dict[str, Any], vocabulary: dict[str, int], source: str) -> tuple[Tokenizer, bool]:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        _log.warning(
            "%s does not say how its text is split before tokenizing (tokenizer.ggml.pre), so GPT-2's rules are used. "
            "If the model has other rules, ITS ANSWERS ARE WORSE: convert the model again with a recent llama.cpp",
            source,
        )
        pre = "default"
    style = _STYLES.get(pre) if isinstance(pre, str) else None
    if style is None:
        known = ", ".join(sorted(_STYLES))
        raise UnsupportedModel(f"{source} splits text by the rules {shortened(pre, 40)!r}; supported are {known}")
    merges = [_halves(merge) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=style.whole_words))
    steps: list[Any] = []
    if style.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if style.split:
        steps.append(pre_tokenizers.Split(Regex(style.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if style.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, style.add_bos


def _halves(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ", 1)
    return left, right


def _sentencepiece(metadata: dict[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    add_space_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges_from_scores(vocabulary, scores),
            unk_token=next(token for token, i in vocabulary.items() if i == unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return merges in SentencePiece's order: merges into tokens of higher score come first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for token, i in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[i], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_special_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Add control tokens and user-defined tokens, which are single tokens wherever they occur in a text."""
    types = metadata.get("tokenizer.ggml.token_type", [])
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        names = [token for token, type_ in zip(tokens, types, strict=False) if type_ == kind and token]
        add([AddedToken(name, normalized=False) for name in names])


def _add_template(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], add_bos: bool) -> None:
    """Make encode() put BOS before a text and EOS after it, if the model requires them."""
    pieces = ["$A"]
    specials: list[tuple[str, int]] = []
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos) and bos is not None:
        pieces.insert(0, tokens[bos])
        specials.append((tokens[bos], bos))
    if metadata.get("tokenizer.ggml.add_eos_token", False) and eos is not None:
        pieces.append(tokens[eos])
        specials.append((tokens[eos], eos))
    if specials:
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=specials)

"""Fill in the middle: prompts that ask a code model for the text between a prefix and a suffix.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022. Each family marks the parts with
special tokens of its own:

    {prefix mark} prefix {suffix mark} suffix {middle mark}       most families
    {suffix mark} suffix {prefix mark} prefix                     Mistral's (Codestral)
"""

from dataclasses import dataclass

from octavo.errors import InvalidRequest

from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Marks:
    """The special tokens of a family.

    Attributes:
        middle: None if the suffix comes first, and the prefix ends the prompt.
        ends: tokens that end the middle, besides the tokenizer's end-of-sequence tokens. Some may be missing.
    """

    prefix: str
    suffix: str
    middle: str | None
    ends: tuple[str, ...] = ()


FAMILIES = (
    # Qwen2.5-Coder, Qwen3-Coder, CodeGemma
    Marks(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<|endoftext|>"),
    ),
    # StarCoder, Granite
    Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<fim_pad>", "<file_sep>", "<repo_name>", "<|endoftext|>")),
    Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<fim-pad>", "<|endoftext|>")),  # SantaCoder
    Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    Marks("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),  # Code Llama
    Marks("[PREFIX]", "[SUFFIX]", None),  # Codestral
)


def infill(
    tokenizer: Tokenizer, prefix: str, suffix: str, max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt for the text between `prefix` and `suffix`, and the ids that end this text.

    Args:
        max_tokens: maximum number of tokens of the prefix, and of the suffix.

    Raises InvalidRequest if the tokenizer does not have the marks of a family, or if a text is not Unicode;
    PromptTooLong.
    """
    marks = marks_of(tokenizer)
    if marks is None:
        message = "suffix needs a model with tokens to fill in the middle, which this model's tokenizer does not have"
        raise InvalidRequest(message, "suffix")
    before = [tokenizer.special_id(marks.prefix), *tokenizer.encode(prefix, False, max_tokens=max_tokens)]
    after = [tokenizer.special_id(marks.suffix), *_continued(tokenizer, suffix, max_tokens)]
    parts = [*before, *after, tokenizer.special_id(marks.middle)] if marks.middle else [*after, *before]
    ends = [end for mark in marks.ends if (end := tokenizer.special_id(mark)) is not None]
    return [*tokenizer.leading_ids, *(part for part in parts if part is not None)], ends


def marks_of(tokenizer: Tokenizer) -> Marks | None:
    """Return the marks of the family that a tokenizer belongs to, None if it has no tokens to fill in the middle."""
    for marks in FAMILIES:
        if all(tokenizer.special_id(mark) is not None for mark in (marks.prefix, marks.suffix, marks.middle) if mark):
            return marks
    return None


def _continued(tokenizer: Tokenizer, text: str, max_tokens: int | None) -> list[int]:
    """Return the ids of a text without the space that SentencePiece puts before one, as Code Llama's authors do it."""
    mark = tokenizer.encode("☺", add_special_tokens=False)
    limit = None if max_tokens is None else max_tokens + len(mark)
    ids = tokenizer.encode("☺" + text, add_special_tokens=False, max_tokens=limit)
    whole = ids[: len(mark)] == mark  # not if the vocabulary has a token of the sign and the letters after it
    return ids[len(mark) :] if whole else tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens)

"""Incremental detokenizer: converts tokens to text, in whole characters."""

import codecs

from .tokenizer import Tokenizer

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Converts the tokens of one output to text, one at a time, in O(1) each. Special tokens have no text.

    The joined texts equal `tokenizer.decode` of all tokens, with one difference: with a SentencePiece vocabulary, the
    space before the first word is kept, because an output continues its prompt.
    """

    __slots__ = ("_decoder", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder: codecs.IncrementalDecoder | None = None  # only within a character of several tokens

    def push(self, token: int) -> str:
        """Return the text that `token` completes: "" within a character of several tokens, and for a special token."""
        if self._decoder is None:
            text = self._tokenizer.whole_text(token)
            if text is not None:
                return text
            self._decoder = _new_decoder("replace")
        elif self._tokenizer.is_special(token):
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token))
        if not self._decoder.getstate()[0]:
            self._decoder = None
        return text

    def flush(self) -> str:
        """Return U+FFFD if the output ends within a character, else ""."""
        return "" if self._decoder is None else self._decoder.decode(b"", final=True)

"""Detokenizer: text from tokens as they come, never half a character."""

import codecs

from .tokenizer import Tokenizer

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one output, token by token; special tokens read as nothing. O(1) a token.

    All it returns, joined, is `tokenizer.decode` of all tokens, but for one thing: a SentencePiece vocabulary's space
    before the first word stays, since an output goes on where its prompt ended.
    """

    __slots__ = ("_decoder", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder: codecs.IncrementalDecoder | None = None  # only within a character of several tokens

    def push(self, token: int) -> str:
        """The new complete text: "" within a character of several tokens, and for a special token."""
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
        """What is left at the end: U+FFFD for a character that was not completed, else ""."""
        return "" if self._decoder is None else self._decoder.decode(b"", final=True)

"""Incremental detokenizer: converts tokens to text, in whole characters."""

import codecs

from .tokenizer import Tokenizer

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Converts the tokens of one output to text, one at a time, in O(1) each.

    The joined texts equal `tokenizer.decode` of all tokens, with one difference: with a SentencePiece vocabulary, the
    space before the first word is kept, because an output continues its prompt.

    Args:
        skip_special_tokens: whether special tokens have no text.
    """

    __slots__ = ("_decoder", "_skip_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special_tokens
        self._decoder: codecs.IncrementalDecoder | None = None  # only within a character of several tokens

    def push(self, token: int) -> str:
        """Return the text that `token` completes; "" within a character of several tokens."""
        if not self._skip_special and self._tokenizer.is_special(token):
            return self.flush() + self._tokenizer.token_text(token)
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
        decoder, self._decoder = self._decoder, None
        return "" if decoder is None else decoder.decode(b"", final=True)

"""Text: tokenizer, chat template, incremental detokenizer."""

from .detokenizer import Detokenizer
from .tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]

"""Text: tokenizer, chat template, incremental detokeniser."""

from .detokenizer import Detokenizer
from .tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]

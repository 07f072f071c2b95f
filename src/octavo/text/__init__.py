"""Text: tokenizer, chat template, incremental detokenizer, stop strings."""

from .detokenizer import Detokenizer
from .tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]

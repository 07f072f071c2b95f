"""Models: the description of their architecture, their parameters, and the forward pass, written once."""

from .registry import describe_model
from .spec import DecoderSpec

__all__ = ["DecoderSpec", "describe_model"]

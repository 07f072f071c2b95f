"""What a model is: its spec, its parameters, and the forward pass described once."""

from .registry import describe_model
from .spec import DecoderSpec

__all__ = ["DecoderSpec", "describe_model"]

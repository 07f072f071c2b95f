"""Weights: find a model's files by name, and map their tensors."""

from .checkpoint import Checkpoint, open_checkpoint
from .fingerprint import fingerprint
from .generation_config import generation_defaults
from .source import model_files, resolve
from .tensor import Parameter, Tensor

__all__ = [
    "Checkpoint",
    "Parameter",
    "Tensor",
    "fingerprint",
    "generation_defaults",
    "model_files",
    "open_checkpoint",
    "resolve",
]

"""Where weights come from: from a model's name to its files, and from files to mapped tensors."""

from .checkpoint import Checkpoint, open_checkpoint
from .fingerprint import fingerprint
from .generation_config import generation_defaults
from .source import resolve
from .tensor import Parameter, Tensor

__all__ = ["Checkpoint", "Parameter", "Tensor", "fingerprint", "generation_defaults", "open_checkpoint", "resolve"]

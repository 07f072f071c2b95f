"""Where weights come from: names to files, files to mapped tensors."""

from .checkpoint import Checkpoint, open_checkpoint
from .fingerprint import fingerprint
from .source import resolve
from .tensor import Parameter, Tensor

__all__ = ["Checkpoint", "Parameter", "Tensor", "fingerprint", "open_checkpoint", "resolve"]

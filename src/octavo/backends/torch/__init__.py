"""Plain PyTorch, on CPU or CUDA: the oracle."""

from .backend import load

__all__ = ["load"]

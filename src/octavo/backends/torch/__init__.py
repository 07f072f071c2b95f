"""Plain PyTorch on CPU or CUDA: the reference for tests."""

from .backend import load

__all__ = ["load"]

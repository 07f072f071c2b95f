"""Plain PyTorch on CPU or CUDA: the reference for tests."""

from .backend import footprint, load

__all__ = ["footprint", "load"]

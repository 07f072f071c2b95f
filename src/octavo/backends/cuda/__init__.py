"""The CUDA backend: Triton kernels for NVIDIA GPUs, with PyTorch for memory, streams and graphs."""

from .backend import footprint, load

__all__ = ["footprint", "load"]

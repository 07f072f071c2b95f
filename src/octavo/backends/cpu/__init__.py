"""The native CPU backend: kernels in C++ (csrc/), chosen at run time for the instruction set at hand."""

from .backend import load

__all__ = ["load"]

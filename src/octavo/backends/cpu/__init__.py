"""The native CPU backend: kernels in C++ (csrc/), chosen at run time for the instruction set at hand."""

from ._native import available_isas
from .backend import load

__all__ = ["available_isas", "load"]

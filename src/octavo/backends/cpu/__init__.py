"""The native CPU backend: kernels in C++ (csrc/), chosen at run time for the instruction set at hand."""

from ._native import available_isas, quantize
from .backend import load
from .calibration import measure_importances

__all__ = ["available_isas", "load", "measure_importances", "quantize"]

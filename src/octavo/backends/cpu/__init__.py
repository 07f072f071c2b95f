"""The native CPU backend: kernels in C++ (csrc/), chosen at run time by the processor's instruction set."""

from ._native import available_isas, quantize
from .backend import footprint, load
from .calibration import measure_importances

__all__ = ["available_isas", "footprint", "load", "measure_importances", "quantize"]

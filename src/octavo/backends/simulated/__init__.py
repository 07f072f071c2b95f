"""The simulated backend: steps take the time that a cost model says, in virtual time, and compute nothing."""

from .backend import SimulatedBackend, VirtualClock, text
from .costs import CostModel, Shape

__all__ = ["CostModel", "Shape", "SimulatedBackend", "VirtualClock", "text"]

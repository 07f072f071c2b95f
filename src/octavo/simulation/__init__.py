"""Simulation: the engine's own scheduler on a backend that computes nothing, in virtual time (`octavo simulate`)."""

from .backend import SimulatedBackend, VirtualClock, text
from .costs import CostModel, Shape

__all__ = ["CostModel", "Shape", "SimulatedBackend", "VirtualClock", "text"]

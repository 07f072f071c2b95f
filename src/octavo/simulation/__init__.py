"""Simulation of the engine in virtual time: the real scheduler, on a backend that computes nothing."""

from .backend import SimulatedBackend, VirtualClock, text
from .costs import CostModel, Shape

__all__ = ["CostModel", "Shape", "SimulatedBackend", "VirtualClock", "text"]

"""Scheduling policies: the order in which waiting sequences are admitted, and which running one gives way."""

from .fair import Fair
from .policy import DEFAULT_TTFT_TARGET, Deadline, Policy, Priority

__all__ = ["DEFAULT_TTFT_TARGET", "Deadline", "Fair", "Policy", "Priority"]

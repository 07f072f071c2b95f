"""Scheduling policies: the order in which waiting sequences are admitted and running ones preempted."""

from .fair import Fair
from .policy import DEFAULT_TTFT_TARGET, Deadline, Policy, Priority

__all__ = ["DEFAULT_TTFT_TARGET", "Deadline", "Fair", "Policy", "Priority"]

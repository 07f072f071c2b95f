"""Autoscaling: the number of engines by their queued tokens, as a horizontal autoscaler of Kubernetes decides it."""

import math
from collections import deque
from dataclasses import dataclass, field

PERIOD = 15.0  # seconds between decisions
TOLERANCE = 0.1  # relative difference from the target that changes nothing
CALM = 300.0  # seconds for which fewer engines must suffice before some are drained


@dataclass
class Autoscaling:
    """Decides the number of engines of a frontend.

        wanted = engines * queued tokens per engine / target

    rounded up, and at least as many as any decision of the latest CALM seconds wanted.

    Args:
        fewest, most: limits of the number of engines.
        target: tokens of prompts that wait to be computed, per engine. A prompt begins to wait when it is sent.
    """

    fewest: int
    most: int
    target: float
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)

    def decide(self, now: float, engines: int, queued_tokens: float) -> int:
        """Return the number of engines that there should be.

        Args:
            engines: those that serve or are on their way.
            queued_tokens: of all of them, in the mean of the time since the last decision.
        """
        ratio = queued_tokens / max(1, engines) / self.target
        wanted = engines if abs(ratio - 1) <= TOLERANCE else math.ceil(engines * ratio)
        wanted = min(max(wanted, self.fewest), self.most)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] <= now - CALM:
            self._wanted.popleft()
        if wanted >= engines:
            return wanted
        return min(engines, max(count for _, count in self._wanted))

"""Scheduling policies that do harm: what a user's code, or a bug of ours, may do to an engine."""

import os
import time

from octavo.engine.policies import Policy
from octavo.engine.sequence import Sequence

POISON = [7, 7, 7]  # a prompt


class Crash(Policy):
    """Ends the engine's process, as a segmentation fault would, for one prompt."""

    def add(self, seq: Sequence) -> None:
        if seq.request.prompt == POISON:
            os._exit(139)
        super().add(seq)


class Hang(Policy):
    """Never returns, for one prompt."""

    def add(self, seq: Sequence) -> None:
        while seq.request.prompt == POISON:
            time.sleep(3600)
        super().add(seq)

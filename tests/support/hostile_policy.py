"""Scheduling policies that do harm: what a user's code, or a bug of ours, may do to an engine."""

import ctypes
import os
import signal
import time
from collections.abc import Iterable

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


class KillItself(Policy):
    """Kills the engine's process from within, for one prompt."""

    def rank(self, seq: Sequence) -> float:
        if seq.request.prompt == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().rank(seq)


class Segfault(Policy):
    """Reads from address 0, for one prompt, when it has its first token."""

    def charge(self, decoding: Iterable[Sequence]) -> None:
        for seq in decoding:
            if seq.request.prompt == POISON:
                ctypes.string_at(0)


class HoldTheLock(Policy):
    """Keeps the interpreter's lock for hours, for one prompt, so that no other thread of the engine runs."""

    def add(self, seq: Sequence) -> None:
        if seq.request.prompt == POISON:
            sum(range(10**13))
        super().add(seq)

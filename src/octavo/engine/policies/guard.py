"""PolicyGuard: protects the engine from faults of a user's policy."""

import logging
import math
from collections.abc import Callable, Collection

from octavo.config import EngineConfig
from octavo.engine.sequence import Sequence

from .policy import Policy

_FAULTS = (Exception, SystemExit)

_log = logging.getLogger("octavo")


class PolicyGuard:
    """Calls a policy for the scheduler, catches the policy's exceptions and checks its results.

    After a fault, the request that the call was about fails. If the call was about several, it is the only one in the
    local variables of the frame that raised. If there is no such request, the fault is logged once and a default
    replaces the result. If this happens in `peek`, requests are served in order of rank from then on.

    Args:
        fail: called with a sequence and the reason why it fails; must remove the sequence.
    """

    def __init__(self, policy: Policy, fail: Callable[[Sequence, str], None]):
        self.policy = policy
        self._fail_sequence = fail
        self._waiting: dict[Sequence, None] = {}
        self._logged: set[str] = set()

    def __len__(self) -> int:
        """Return the number of sequences that wait in the policy."""
        return len(self._waiting)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._waiting

    def set_place(self, seq: Sequence) -> bool:
        """Give a new sequence its place. Return False if it failed."""
        try:
            rank = self.policy.rank(seq)
            if not math.isfinite(rank):
                raise ValueError(f"the rank must be a number of seconds, not {rank}")
        except _FAULTS as error:
            self._fail(seq, error)
            return False
        seq.place = (float(rank), seq.order)
        return True

    def add(self, seq: Sequence) -> None:
        self._waiting[seq] = None
        try:
            self.policy.add(seq)
        except _FAULTS as error:
            self._fail(seq, error)

    def remove(self, seq: Sequence) -> None:
        del self._waiting[seq]
        try:
            self.policy.remove(seq)
        except _FAULTS as error:
            self._log("remove", error)

    def peek(self) -> Sequence | None:
        while True:
            try:
                seq = self.policy.peek()
                if seq is None or seq in self._waiting:
                    return seq
                raise TypeError(f"peek returned a {type(seq).__name__} that is not a waiting sequence")
            except _FAULTS as error:
                if not self._fail_culprit(error, self._waiting):
                    self._replace_policy(error)

    def pop(self, seq: Sequence) -> bool:
        """Remove the sequence that `peek` returned. Return False if it failed."""
        try:
            self.policy.pop()
        except _FAULTS as error:
            self._fail(seq, error)
            return False
        del self._waiting[seq]
        return True

    def charge(self, decoding: list[Sequence]) -> bool:
        """Charge one output token for each sequence. Return False if one of the sequences may have failed."""
        try:
            self.policy.charge(decoding)
        except _FAULTS as error:
            if not self._fail_culprit(error, decoding):
                self._log("charge", error)
            return False
        return True

    def victim(self, running: Collection[Sequence]) -> Sequence | None:
        """Return the sequence to preempt; None if a sequence failed instead. The default is the one admitted last."""
        try:
            seq = self.policy.victim(running)
            if seq in running:
                return seq
            raise TypeError(f"victim returned a {type(seq).__name__} that is not a running sequence")
        except _FAULTS as error:
            if self._fail_culprit(error, running):
                return None
            self._log("victim", error)
            return list(running)[-1]

    def preempt_for(self, waiting: Sequence, running: Collection[Sequence]) -> Sequence | None:
        try:
            seq = self.policy.preempt_for(waiting, running)
            if seq is None or seq in running:
                return seq
            raise TypeError(f"preempt_for returned a {type(seq).__name__} that is not a running sequence")
        except _FAULTS as error:
            if not self._fail_culprit(error, [waiting, *running]):
                self._log("preempt_for", error)
            return None

    def sort(self, sequences: list[Sequence]) -> None:
        """Sort by key, the last to be served first. Sequences whose keys cannot be compared fail and are removed."""
        try:
            sequences.sort(key=self.policy.key, reverse=True)
        except _FAULTS:
            sequences[:] = [seq for seq in sequences if self._has_key(seq)]
            try:
                sequences.sort(key=self.policy.key, reverse=True)
            except _FAULTS as error:  # each key can be compared with its place, but not all keys with each other
                self._log("key", error)
                sequences.sort(key=lambda seq: seq.place, reverse=True)

    def goes_before(self, first: Sequence, second: Sequence) -> bool | None:
        """Return whether the key of `first` is lower; None if one of the two failed."""
        try:
            return bool(self.policy.key(first) < self.policy.key(second))
        except _FAULTS as error:
            if self._has_key(first) and self._has_key(second):
                self._log("key", error)
                return first.place < second.place
            return None

    def _has_key(self, seq: Sequence) -> bool:
        """Return whether the sequence has a key that can be compared with its place. If not, fail the sequence."""
        try:
            bool(self.policy.key(seq) < seq.place)
        except _FAULTS as error:
            self._fail(seq, error)
            return False
        return True

    def _fail(self, seq: Sequence, error: BaseException) -> None:
        self._fail_sequence(seq, f"the scheduling policy failed: {type(error).__name__}: {error}")

    def _fail_culprit(self, error: BaseException, among: Collection[Sequence]) -> bool:
        """Fail the sequence that the policy was working on, if it can be found. Return whether it was found.

        It is found if the innermost frame with any sequence in its local variables has exactly one of `among`.
        """
        culprits: set[Sequence] = set()
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # without the guard's own frame
        while trace:
            culprits = {value for value in trace.tb_frame.f_locals.values() if type(value) is Sequence} or culprits
            trace = trace.tb_next
        found = [seq for seq in culprits if seq in among]
        if len(found) == 1:
            self._fail(found[0], error)
        return len(found) == 1

    def _replace_policy(self, error: BaseException) -> None:
        """Serve all waiting sequences in order of their place from now on."""
        self._log("peek", error, "; requests are served in order of rank from now on")
        self.policy = Policy(getattr(self.policy, "config", None) or EngineConfig())
        for seq in self._waiting:
            self.policy.add(seq)

    def _log(self, method: str, error: BaseException, consequence: str = "") -> None:
        if method not in self._logged:
            self._logged.add(method)
            _log.error("the scheduling policy failed in %s: %s: %s%s", method, type(error).__name__, error, consequence)

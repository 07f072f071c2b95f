"""Turns: after a crash, let frontends back to the engine one at a time."""

from collections import deque
from collections.abc import Callable

from .session import Session

LONGEST = 60  # beats after which a turn ends anyway


class Turns:
    """The order in which frontends get an engine that succeeds a crashed one.

    A frontend tries the requests that may have caused the crash one at a time, alone with the engine (Readmission in
    octavo.frontend.readmission). So no other frontend may use the engine meanwhile, whose requests would be blamed, or
    whose faults would be. In its turn, a frontend has the engine for itself, until it says that nothing is on trial.

    Args:
        admit: tells a frontend that the engine is ready.
        release: sends what a frontend has asked for during another one's turn.
    """

    def __init__(self, admit: Callable[[Session], None], release: Callable[[Session], None]):
        self._admit, self._release = admit, release
        self._line: deque[Session] = deque()
        self._current: Session | None = None
        self._admitted: list[Session] = []
        self._beats = 0

    def enter(self, session: Session, alone: bool) -> None:
        """Admit a frontend, now or in its turn.

        Args:
            alone: whether the engine before has crashed, so that the frontend may have requests to try.
        """
        if self._current is None and not alone:
            self._let_in(session)
        else:
            self._line.append(session)
            self._next()

    def must_wait(self, session: Session) -> bool:
        """Return whether a frontend's requests must be held, since another one has its turn."""
        return self._current is not None and self._current is not session

    def beat(self, session: Session) -> None:
        """Note a frontend's sign of life, which says whether it has requests on trial."""
        if session is self._current and session.is_open:
            self._end_turn()

    def tick(self) -> None:
        """Count a beat of the host."""
        self._beats += 1
        if self._current is not None and self._beats > LONGEST:
            self._end_turn()

    def leave(self, session: Session) -> None:
        """Forget a frontend."""
        if session in self._line:
            self._line.remove(session)
        if session in self._admitted:
            self._admitted.remove(session)
        if session is self._current:
            self._end_turn()

    def clear(self) -> None:
        """Forget all frontends."""
        self._line.clear()
        self._admitted.clear()
        self._current = None

    def _let_in(self, session: Session) -> None:
        self._admitted.append(session)
        self._admit(session)

    def _next(self) -> None:
        if self._current is None and self._line:
            self._current, self._beats = self._line.popleft(), 0
            self._current.is_open = False  # until its first beat after it was admitted
            self._let_in(self._current)

    def _end_turn(self) -> None:
        self._current = None
        self._next()
        if self._current is None:
            for session in list(self._admitted):
                self._release(session)

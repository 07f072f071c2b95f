"""Readmission: after a crash, find the request that caused it while all others go on."""

from collections import deque
from collections.abc import Callable, Iterable

from .live import LiveRequest

SUSPECT_KILLS = 2  # kills from outside, with no token between them, after which a request is under suspicion too
BLAMED_KILLS = 4  # and after which it is held responsible
LONG_TRIAL = 3  # crashes after which a trial lasts until the request ends


class Readmission:
    """Sends live requests to an engine: all at once, or one at a time while one of them is suspected of crashing it.

    When an engine fails, every request that it served is a suspect. The next engine gets the suspects one at a time,
    each when the one before has computed a token or ended. If that engine fails too, the one on trial is the cause.
    Requests that arrive meanwhile wait until the suspects are through. An engine that was killed from outside (by the
    kernel when memory ran out, by an operator) raises no suspicion the first time.

    Args:
        send: sends one request to the engine.
    """

    def __init__(self, send: Callable[[LiveRequest], None]):
        self._send = send
        self._is_ready = False
        self._waiting: deque[LiveRequest] = deque()  # requests that the engine is not to have yet
        self._suspects = 0  # number of requests at the head of `_waiting` that go one at a time
        self._trial: LiveRequest | None = None

    def add(self, live: LiveRequest) -> None:
        """Send a new request, or let it wait for its turn."""
        if self._is_ready and self._trial is None:
            self._pass_on(live)
        else:
            self._waiting.append(live)

    def engine_lost(self, lives: Iterable[LiveRequest], is_fault: bool) -> LiveRequest | None:
        """Take all requests back. Return the one that has caused the loss, if that is known; it is not sent again.

        Args:
            lives: every live request.
            is_fault: whether the engine failed by itself (see links.Exit).
        """
        self._is_ready, culprit, self._trial = False, self._trial, None
        sent = [live for live in lives if live.sent]
        for live in sent:
            live.crashes += is_fault or not live.progressed
        if culprit is not None and culprit.crashes < (2 if is_fault else BLAMED_KILLS):
            culprit = None
        suspicious = culprit is None and (is_fault or any(live.crashes >= SUSPECT_KILLS for live in sent))
        # Those that computed tokens are less likely to be the cause: they come first, so that they wait least.
        sent.sort(key=lambda live: (not live.progressed, live.crashes, live.arrival))
        again = [live for live in sent if live is not culprit]
        for live in sent:
            live.sent = live.progressed = False
        waiting = [live for live in self._waiting if not live.crashes]
        before = [live for live in self._waiting if live.crashes and live is not culprit]
        self._waiting = deque([*again, *before, *waiting])
        self._suspects = len(again) + len(before) if suspicious else 0
        return culprit

    def engine_ready(self) -> None:
        """Begin to send to a new engine."""
        self._is_ready = True
        self._next()

    def progressed(self, live: LiveRequest) -> None:
        """Note that the engine has computed a token of a request."""
        live.progressed = True
        if live is self._trial and live.crashes < LONG_TRIAL:
            self._trial = None
            self._next()

    def ended(self, live: LiveRequest) -> None:
        """Forget a request that has ended, for whatever reason."""
        if live is self._trial:
            self._trial = None
            self._next()
        elif self._waiting and not live.sent and live in self._waiting:
            self._suspects -= self._waiting.index(live) < self._suspects
            self._waiting.remove(live)

    def _next(self) -> None:
        """Send the next suspect; when there is none left, everybody else."""
        while self._waiting and self._is_ready and self._trial is None:
            live = self._waiting.popleft()
            if self._suspects:
                self._suspects -= 1
                self._trial = live
            self._pass_on(live)

    def _pass_on(self, live: LiveRequest) -> None:
        live.sent, live.progressed = True, False
        self._send(live)

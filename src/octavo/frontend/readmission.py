"""Readmission: after a crash, find the request that caused it while all others go on."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from octavo.engine.work_record import Work

from .links.link import Exit
from .live import LiveRequest

ENOUGH_FAULTS = 2  # engines that must fail of a request before it is given up
SUSPECT_KILLS = 3  # kills from outside, with no token between them, after which a request is under suspicion too
ENOUGH_KILLS = 5  # and after which it is given up
TRIAL_TOKENS = 2  # tokens that end a trial: of a step that computes a prompt, and of one that decodes
LONG_TRIAL = 3  # crashes after which a trial lasts until the request ends


class Readmission:
    """Sends live requests to an engine: all at once, or one at a time while one of them is suspected of crashing it.

    The engine's record of its work says what it was busy with when it failed:

    - One request alone: if the next engine fails of it too, it is the cause. The others are sent before it, and it only
      when one of them has computed a token.
    - A step, or nothing in particular: the requests in the step, or all, are suspects. The next engine gets them one at
      a time, each when the one before has computed TRIAL_TOKENS or ended. If that engine fails too, the one on trial is
      the cause. The others, and those that arrive meanwhile, wait until the suspects are through.

    An engine that was killed from outside raises no suspicion at first.

    Args:
        send: sends one request to the engine.
    """

    def __init__(self, send: Callable[[LiveRequest], None]):
        self._send = send
        self._is_ready = False
        self._suspects: deque[LiveRequest] = deque()  # to be sent one at a time, before all others
        self._waiting: deque[LiveRequest] = deque()  # to be sent then
        self._last: deque[LiveRequest] = deque()  # to be sent when others have made progress, if there are others
        self._trial: LiveRequest | None = None

    def add(self, live: LiveRequest) -> None:
        """Send a new request, or let it wait for its turn."""
        if self._is_ready and self._trial is None:
            self._pass_on(live)
        else:
            self._waiting.append(live)

    def engine_lost(self, lives: Iterable[LiveRequest], exit: Exit) -> LiveRequest | None:
        """Take all requests back. Return the one that has caused the loss, if that is known; it is not sent again.

        Args:
            lives: every live request.
        """
        self._is_ready, trial, self._trial = False, self._trial, None
        # Those that computed tokens are less likely to be the cause: they come first, so that they wait least.
        sent = sorted((live for live in lives if live.sent), key=lambda live: (not live.progress, live.arrival))
        busy_with = _busy_with(sent, exit.work)
        alone = exit.work.alone is not None
        for live in busy_with:
            live.crashes += exit.is_fault or alone or not live.progress
        accused = next(iter(busy_with), None) if alone else trial
        enough = ENOUGH_FAULTS if exit.is_fault or alone else ENOUGH_KILLS
        culprit = accused if accused and accused in busy_with and accused.crashes >= enough else None

        if culprit is not None:
            self._waiting.extendleft(reversed(self._suspects))
            suspects = []
        elif alone:
            suspects = [*self._suspects]
        elif exit.is_fault or any(live.crashes >= SUSPECT_KILLS for live in busy_with):
            suspects = [*busy_with, *self._suspects]
        else:
            suspects = [*([trial] if trial in sent else []), *self._suspects]
        others = [live for live in sent if live is not culprit and live not in suspects]
        if alone:
            self._last.extend(live for live in busy_with if live is not culprit)
            others = [live for live in others if live not in busy_with]
        for live in sent:
            live.sent, live.progress = False, 0
        self._suspects = deque(suspects)
        self._waiting.extendleft(reversed(others))
        return culprit

    def engine_ready(self) -> None:
        """Begin to send to a new engine."""
        self._is_ready = True
        has_others = bool(self._suspects or self._waiting)
        self._next()
        if not has_others:
            self._send_last()

    def progressed(self, live: LiveRequest) -> None:
        """Note that the engine has computed a token of a request; to be called for the first TRIAL_TOKENS at least."""
        live.progress += 1
        if live is self._trial and live.progress >= TRIAL_TOKENS and live.crashes < LONG_TRIAL:
            self._trial = None
            self._next()
        self._send_last()

    def ended(self, live: LiveRequest) -> None:
        """Forget a request that has ended, for whatever reason."""
        if live is self._trial:
            self._trial = None
            self._next()
        elif not live.sent:
            for queue in (self._suspects, self._waiting, self._last):
                if live in queue:
                    queue.remove(live)
        self._send_last()

    def _next(self) -> None:
        """Send the next suspect; when there is none left, everybody else."""
        while self._is_ready and self._trial is None and (self._suspects or self._waiting):
            if self._suspects:
                self._trial = self._suspects.popleft()
                self._pass_on(self._trial)
            else:
                self._pass_on(self._waiting.popleft())

    def _send_last(self) -> None:
        if self._is_ready and self._trial is None and not (self._suspects or self._waiting):
            while self._last:
                self._pass_on(self._last.popleft())

    def _pass_on(self, live: LiveRequest) -> None:
        live.sent, live.progress = True, 0
        self._send(live)


def _busy_with(sent: Sequence[LiveRequest], work: Work) -> Sequence[LiveRequest]:
    """Return those of the requests that the engine had been sent with which it was busy."""
    if work.alone is not None:
        return [live for live in sent if work.alone in live.engine_ids]
    if work.prompts is not None:
        prompts = set(work.prompts)
        return [live for live in sent if live.progress or not prompts.isdisjoint(live.engine_ids)]
    return sent

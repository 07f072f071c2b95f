"""Readmission: after a crash, find the request that caused it, and let all others continue."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from octavo.engine.work_record import Work

from .links.link import Exit
from .live import LiveRequest

ENOUGH_FAULTS = 2  # faults of engines after which the request that they served fails
SUSPECT_KILLS = 3  # kills from outside without a token in between after which a request becomes a suspect
ENOUGH_KILLS = 5  # kills from outside after which a suspect fails
TRIAL_TOKENS = 2  # tokens that end a trial: one from a step that computes the prompt, one from a decode step
LONG_TRIAL = 3  # crashes after which a trial lasts until the request ends


class Readmission:
    """Sends live requests to an engine: all at once, or one at a time while one of them is suspected of crashing it.

    The engine's WorkRecord shows its work at the time of the failure:

    - One request alone: this request is the cause if the next engine fails on it too. The next engine gets all other
      requests first, and this one after another request has computed a token.
    - A step, or nothing in particular: the requests in the step, or all requests, are suspects. The next engine gets
      one suspect at a time: each is on trial until it has computed TRIAL_TOKENS or ended. If this engine fails too, the
      request on trial is the cause. All other requests, including new ones, wait until the last suspect's trial ends.

    If an engine was killed from outside, its requests become suspects only after SUSPECT_KILLS such kills.

    Args:
        send: sends one request to the engine.
    """

    def __init__(self, send: Callable[[LiveRequest], None]):
        self._send = send
        self._is_ready = False
        self._suspects: deque[LiveRequest] = deque()  # to be sent one at a time, before all others
        self._waiting: deque[LiveRequest] = deque()  # to be sent after the suspects
        self._last: deque[LiveRequest] = deque()  # to be sent after a token of another request, if there are others
        self._trial: LiveRequest | None = None

    def add(self, live: LiveRequest) -> None:
        """Send a new request, or queue it while there is no engine or a trial is running."""
        if self._is_ready and self._trial is None:
            self._pass_on(live)
        else:
            self._waiting.append(live)

    def engine_lost(self, lives: Iterable[LiveRequest], exit: Exit) -> LiveRequest | None:
        """Queue all requests that the engine had. Return the one that caused its end, if known; it is not sent again.

        Args:
            lives: every live request.
        """
        self._is_ready, trial, self._trial = False, self._trial, None
        # Requests with progress are less likely to be the cause, so they come first and wait least.
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
        """Begin to send requests to a new engine."""
        self._is_ready = True
        has_others = bool(self._suspects or self._waiting)
        self._next()
        if not has_others:
            self._send_last()

    def progressed(self, live: LiveRequest) -> None:
        """Note that the engine has computed a token of a request. Call this at least for the first TRIAL_TOKENS."""
        live.progress += 1
        if live is self._trial and live.progress >= TRIAL_TOKENS and live.crashes < LONG_TRIAL:
            self._trial = None
            self._next()
        self._send_last()

    def ended(self, live: LiveRequest) -> None:
        """Forget a request that has ended for any reason."""
        if live is self._trial:
            self._trial = None
            self._next()
        elif not live.sent:
            for queue in (self._suspects, self._waiting, self._last):
                if live in queue:
                    queue.remove(live)
        self._send_last()

    def _next(self) -> None:
        """Send the next suspect, or, if there is none left, all waiting requests."""
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
    """Return the requests among `sent` that the engine was working on."""
    if work.alone is not None:
        return [live for live in sent if work.alone in live.engine_ids]
    if work.prompts is not None:
        prompts = set(work.prompts)
        return [live for live in sent if live.progress or not prompts.isdisjoint(live.engine_ids)]
    return sent

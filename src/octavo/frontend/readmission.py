"""Readmission: after a crash of a replica, find the request that caused it, and let all others continue."""

from collections import deque
from collections.abc import Callable, Collection, Sequence

from octavo.engine.work_record import Work

from .links.link import Exit
from .live import LiveRequest

ENOUGH_FAULTS = 2  # faults of engines after which the request that they served fails
SUSPECT_KILLS = 3  # kills from outside without a token in between after which a request becomes a suspect
ENOUGH_KILLS = 5  # kills from outside after which a suspect fails
TRIAL_TOKENS = 2  # tokens that end a trial: one from a step that computes the prompt, one from a decode step
LONG_TRIAL = 3  # crashes after which a trial lasts until the request ends


class Readmission:
    """Sends live requests to one replica: all at once, or one at a time while one is suspected of crashing engines.

    The engine's WorkRecord shows its work at the time of the failure:

    - One request alone: this request is the cause if the next engine fails on it too. The next engine gets it after
      another request has computed a token, if it has other requests.
    - A step, or nothing in particular: the requests in the step, or all requests, are suspects. The next engine gets
      one suspect at a time: each is on trial until it has computed TRIAL_TOKENS or ended. If this engine fails too, the
      request on trial is the cause. The replica takes no other requests until the last suspect's trial ends.

    If an engine was killed from outside, its requests become suspects only after SUSPECT_KILLS such kills.

    Args:
        send: sends one request to the engine.
        opened: called when the replica begins to take any request.
    """

    def __init__(self, send: Callable[[LiveRequest], None], opened: Callable[[], None]):
        self._send, self._opened = send, opened
        self._is_ready = False
        self._has_others = False  # whether the current engine was sent a request
        self._suspects: deque[LiveRequest] = deque()  # to be sent one at a time
        self._last: deque[LiveRequest] = deque()  # to be sent after a token of another request, if there are others
        self._trial: LiveRequest | None = None

    @property
    def is_open(self) -> bool:
        """Return whether any request may be sent: there is an engine, and no trial."""
        return self._is_ready and self._trial is None

    def is_on_trial(self, live: LiveRequest) -> bool:
        return live is self._trial

    def add(self, live: LiveRequest) -> None:
        """Send a request. The replica must be open."""
        live.sent, live.progress = True, 0
        self._has_others = True
        self._send(live)

    def engine_lost(self, lives: Collection[LiveRequest], exit: Exit) -> tuple[LiveRequest | None, list[LiveRequest]]:
        """Take back the requests that were sent to the engine, and keep those that may have caused its end.

        If the request on trial is the cause, its crashes are not held against the other requests any more.

        Args:
            lives: every live request of this replica.

        Returns:
            The request that caused the end, if known, which must not be sent again; and the requests that any replica
            may continue now. Those with progress come first: they are less likely to be the cause, and wait least.
        """
        self._is_ready, trial, self._trial = False, self._trial, None
        sent = sorted((live for live in lives if live.sent), key=lambda live: (not live.progress, live.arrival))
        busy_with = _busy_with(sent, exit.work)
        alone = exit.work.alone is not None
        for live in busy_with:
            live.crashes += exit.is_fault or alone or not live.progress
        accused = next(iter(busy_with), None) if alone else trial
        enough = ENOUGH_FAULTS if exit.is_fault or alone else ENOUGH_KILLS
        culprit = accused if accused and accused in busy_with and accused.crashes >= enough else None

        freed, suspects = list[LiveRequest](), [*([trial] if trial else []), *self._suspects]
        if culprit is not None and culprit is trial:
            freed, suspects = [*self._suspects], []
        elif alone:
            suspects = [live for live in suspects if live not in busy_with]
        elif exit.is_fault or any(live.crashes >= SUSPECT_KILLS for live in busy_with):
            suspects = [*busy_with, *(live for live in suspects if live not in busy_with)]
        others = [live for live in sent if live is not culprit and live not in suspects]
        if alone:
            self._last.extend(live for live in busy_with if live is not culprit)
            others = [live for live in others if live not in busy_with]
        for live in lives:
            live.sent, live.progress = False, 0
            if culprit is not None and live is not culprit and not alone:
                live.crashes = max(0, live.crashes - culprit.crashes)
        self._suspects = deque(suspects)
        return culprit, others + freed

    def engine_ready(self) -> None:
        """Begin to send requests to a new engine."""
        self._is_ready, self._has_others = True, False
        self._proceed()
        if not self._has_others:
            self._send_last()

    def release(self) -> list[LiveRequest]:
        """Forget and return the requests that wait for a new engine, in the order in which they would be sent."""
        waiting = [*self._suspects, *self._last]
        self._suspects.clear()
        self._last.clear()
        return waiting

    def progressed(self, live: LiveRequest) -> None:
        """Note that the engine has computed a token of a request. Call this at least for the first TRIAL_TOKENS."""
        live.progress += 1
        if live is self._trial and live.progress >= TRIAL_TOKENS and live.crashes < LONG_TRIAL:
            self._trial = None
            self._proceed()
        self._send_last()

    def ended(self, live: LiveRequest) -> None:
        """Forget a request that has ended for any reason, or continues on another replica."""
        if live is self._trial:
            self._trial = None
            self._proceed()
        elif not live.sent:
            for queue in (self._suspects, self._last):
                if live in queue:
                    queue.remove(live)
        self._send_last()

    def _proceed(self) -> None:
        """Send the next suspect, or take any request if there is none left."""
        if not self.is_open:
            return
        if self._suspects:
            self._trial = self._suspects.popleft()
            self.add(self._trial)
        else:
            self._opened()

    def _send_last(self) -> None:
        while self.is_open and self._last:
            self.add(self._last.popleft())


def _busy_with(sent: Sequence[LiveRequest], work: Work) -> Sequence[LiveRequest]:
    """Return the requests among `sent` that the engine was working on."""
    if work.alone is not None:
        return [live for live in sent if work.alone in live.engine_ids]
    if work.prompts is not None:
        prompts = set(work.prompts)
        return [live for live in sent if live.progress or not prompts.isdisjoint(live.engine_ids)]
    return sent

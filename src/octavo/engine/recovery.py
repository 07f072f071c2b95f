"""Whether pages that a lower tier has are fetched or computed again: the tokens are the same, so what is quicker."""

from .sequence import Sequence

FULL_STEP = 64  # rows; what a token costs in a smaller step says little about a prompt's
MEMORY = 0.9  # of the average of steps so far, in the next one


class Recovery:
    """`preemption`: how a sequence that lost its pages gets them back, swap (fetch), recompute, or auto.

    New prompts, and preempted sequences under auto, go by the measured time of a page: to fetch it, or to compute its
    tokens. Until a full step has been measured, it is fetched.
    """

    def __init__(self, preemption: str, page_size: int):
        self._preemption = preemption
        self._page_size = page_size
        self._seconds_per_token: float | None = None

    def computed(self, tokens: int, seconds: float) -> None:
        """A step took so long."""
        if tokens >= FULL_STEP:
            latest = seconds / tokens
            before = latest if self._seconds_per_token is None else self._seconds_per_token
            self._seconds_per_token = MEMORY * before + (1 - MEMORY) * latest

    def fetches(self, seq: Sequence, seconds_per_page: float) -> bool:
        """Whether what a lower tier has of `seq` is to be fetched."""
        if seq.num_outputs and self._preemption != "auto":
            return self._preemption == "swap"
        if self._seconds_per_token is None:
            return True
        return seconds_per_page < self._page_size * self._seconds_per_token

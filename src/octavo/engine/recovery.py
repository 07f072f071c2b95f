"""Recovery: decides whether to fetch pages from a lower tier or to recompute them. Both give the same tokens."""

from .sequence import Sequence

FULL_STEP = 64  # minimum rows of a measured step; in smaller steps, a token costs more than in a prompt
SMOOTHING = 0.1  # weight of the latest step in the average


class Recovery:
    """Compares the measured time to fetch a page with the measured time to compute its tokens.

    Until a step of at least FULL_STEP rows has been measured, pages are fetched.

    Args:
        preemption: how preempted sequences get their pages back: "swap" (always fetch), "recompute" or "auto"
            (the faster of the two). For new prompts, the faster one is always chosen.
        page_size: tokens per page.
    """

    def __init__(self, preemption: str, page_size: int):
        self._preemption = preemption
        self._page_size = page_size
        self.seconds_per_token: float | None = None  # measured

    def record_step(self, rows: int, seconds: float) -> None:
        """Take the duration of a step into account."""
        if rows >= FULL_STEP:
            latest = seconds / rows
            before = latest if self.seconds_per_token is None else self.seconds_per_token
            self.seconds_per_token = (1 - SMOOTHING) * before + SMOOTHING * latest

    @property
    def seconds_per_page(self) -> float | None:
        """Return the measured time to compute the tokens of a page, in seconds; None if it was not measured yet."""
        return None if self.seconds_per_token is None else self._page_size * self.seconds_per_token

    def should_fetch(self, seq: Sequence, seconds_per_page: float) -> bool:
        """Return whether to fetch the pages of `seq` that a lower tier has, rather than recompute them."""
        if seq.num_outputs and self._preemption != "auto":
            return self._preemption == "swap"
        if self.seconds_per_token is None:
            return True
        return seconds_per_page < self._page_size * self.seconds_per_token

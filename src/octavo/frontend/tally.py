"""Tally: the tokens that requests take, known while they run."""

from collections.abc import Sequence

from .live import LiveRequest


class Tally:
    """Counts tokens of prompts and answers. A prompt counts from when its request is accepted."""

    def __init__(self) -> None:
        self._counted = 0
        self._running: list[LiveRequest] = []

    @property
    def total(self) -> int:
        """Return the tokens so far."""
        running = sum(len(live.prompt_token_ids) + live.num_tokens for live in self._running)
        return self._counted + running

    def begin(self, lives: Sequence[LiveRequest]) -> None:
        """Count requests from now on."""
        self._running += lives

    def end(self) -> None:
        """Note that all requests have ended."""
        self._counted, self._running = self.total, []

    def add(self, tokens: int) -> None:
        """Count tokens that no request of these has."""
        self._counted += tokens

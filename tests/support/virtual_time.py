"""Virtual time: an event loop whose clock jumps to the next timer, so that waiting takes no time."""

import asyncio
import selectors
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ITERATION = 1e-6  # seconds that an iteration of the loop takes at least
CLOCKED = ("frontend", "ledger", "live", "replica")  # modules of octavo.frontend that read time.monotonic()


class _Selector(selectors.SelectSelector):
    """Advances the loop's clock instead of waiting."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("a deadlock: nothing is left that could happen")
        self.loop.now += max(timeout, ITERATION)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a virtual clock, `now`. Raises RuntimeError if it would wait forever."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


class Clock:
    """Stands for the module `time`."""

    def __init__(self, loop: VirtualLoop):
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.now

    def time(self) -> float:
        return 1e9 + self._loop.now


@contextmanager
def virtual_loop() -> Iterator[VirtualLoop]:
    """Make a loop whose clock the frontend's modules read too."""
    loop = VirtualLoop()
    with pytest.MonkeyPatch.context() as patch:
        for module in CLOCKED:
            patch.setattr(f"octavo.frontend.{module}.time", Clock(loop))
        try:
            yield loop
        finally:
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks))
            loop.close()


def check_no_task_is_left(loop: VirtualLoop) -> None:
    """Check that nothing runs on a loop any more. Cancelled tasks get a few iterations to end."""

    async def wait() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    loop.run_until_complete(wait())
    left = asyncio.all_tasks(loop)
    assert not left, left

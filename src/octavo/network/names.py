"""Names: the engines that addresses stand for, which are looked up again and again, since they change."""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from octavo.address import Address
from octavo.daemon_thread import in_daemon_thread

PATIENCE = 1.0  # seconds that `look` waits for answers
AT_ONCE = 16  # names that are looked up at the same time
MISSES = 3  # answers in a row without an engine after which a name does not stand for it any more

log = logging.getLogger("octavo")


@dataclass(eq=False, slots=True)
class _Name:
    """What is known about one address: its latest answers, the problem of the latest look-up, and the one under way."""

    answers: deque[list[Address]] = field(default_factory=lambda: deque(maxlen=MISSES))
    problem: str = ""
    looking: asyncio.Task[None] | None = None


class Names:
    """Addresses, by name or by number, and what they stand for. To be used on one loop, and closed there.

    Each name has at most one look-up under way, so one whose server does not answer holds up no other one.
    """

    def __init__(self, addresses: Iterable[Address]):
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._names: dict[Address, _Name] = {}
        self.set(addresses)

    def set(self, addresses: Iterable[Address]) -> None:
        """Look up these addresses from now on, and forget all others."""
        before = self._names
        self._names = {address: before.get(address) or _Name() for address in addresses}
        _stop(name for address, name in before.items() if address not in self._names)

    async def look(self) -> list[Address]:
        """Look all addresses up, and return the number of each engine that they stand for.

        For a name that does not answer in time, or is not known, its earlier answers count.
        """
        for address, name in self._names.items():
            if name.looking is None and not (name.answers and address.is_number):
                name.looking = asyncio.create_task(self._look_up(address, name))
        if looking := [name.looking for name in self._names.values() if name.looking is not None]:
            await asyncio.wait(looking, timeout=PATIENCE)
        answers = (answer for name in self._names.values() for answer in name.answers)
        return list(dict.fromkeys(engine for answer in answers for engine in answer))

    def forget(self) -> None:
        """Stop the look-ups, and forget all answers."""
        _stop(self._names.values())
        self._names = {address: _Name() for address in self._names}

    async def _look_up(self, address: Address, name: _Name) -> None:
        try:
            async with self._turns:
                name.answers.append(await in_daemon_thread(address.resolved))
            name.problem = ""
        except OSError as error:
            if (problem := str(error.strerror or error)) != name.problem:
                name.problem = problem
                log.error("%s cannot be looked up: %s", address, problem)
        finally:
            name.looking = None


def _stop(names: Iterable[_Name]) -> None:
    for name in names:
        if name.looking is not None:
            name.looking.cancel()

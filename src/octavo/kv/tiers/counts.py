"""TierCounts: what has been moved to and from one kind of tier."""

from collections.abc import Iterable, Mapping

import msgspec


class TierCounts(msgspec.Struct):
    """Counts since the start of the engine.

    Attributes:
        hits: pages read.
        misses: pages asked for that were not there, or not any more.
        bytes_read, bytes_written: content of the pages read and written.
        seconds: time in reads of pages.
        errors: calls that failed, and pages of a shared store that were damaged or changed.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    errors: int = 0


def total_counts(counts: Iterable[Mapping[str, TierCounts]]) -> dict[str, TierCounts]:
    """Return the sums of counts by the name of the tier."""
    total: dict[str, TierCounts] = {}
    for each in counts:
        for name, some in each.items():
            before = msgspec.structs.astuple(total.get(name, TierCounts()))
            pairs = zip(before, msgspec.structs.astuple(some), strict=True)
            total[name] = TierCounts(*(a + b for a, b in pairs))
    return total

"""Sharing: the pages that an engine shares with others through a store."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from octavo.backends.base import Backend
from octavo.kv.page_pool import PagePool
from octavo.kv.tiers.counts import TierCounts
from octavo.kv.transfers import Finished

from .health import Health
from .page_values import PageValues
from .reading import Fetch, Lookup, Reading
from .store import Store
from .writing import Writing

if TYPE_CHECKING:
    from octavo.formats.page_cipher import PageCipher


class Sharing:
    """Reads pages that other engines have computed, and writes those of this engine. It never waits for the store.

    All methods are for the engine's thread.

    Args:
        store: where the pages are; closed with this object.
        backend: exports and imports the content of pages.
        fingerprint: that of the engine.
        ttl: seconds that the store keeps a page after its last use.
        cipher: encrypts pages.
        on_change: called by threads when there is something to do before the next step.
    """

    name = "store"

    def __init__(
        self,
        store: Store,
        backend: Backend,
        *,
        fingerprint: str,
        ttl: float,
        cipher: "PageCipher | None" = None,
        on_change: Callable[[], None],
    ):
        self._store = store
        self.counts = TierCounts()
        values, health = PageValues(fingerprint, backend.page_bytes, cipher), Health(str(store))
        parts = (store, values, backend, health, self.counts)
        self._writing = Writing(*parts, ttl=ttl, on_change=on_change)
        self._reading = Reading(
            *parts, on_change=on_change, on_loss=self._writing.note_lacking, on_return=self._writing.forget
        )

    @property
    def is_available(self) -> bool:
        """Return whether the store can be asked for pages now."""
        return self._reading.is_available

    @property
    def is_moving(self) -> bool:
        """Return whether a sequence waits for the store, or pages are being written that it takes."""
        return self._reading.is_moving or self._writing.is_moving

    @property
    def pages_written(self) -> int:
        return self._writing.pages_written

    @property
    def num_pending(self) -> int:
        """Return the number of pages that are being written, or wait for it."""
        return self._writing.num_pending

    def seconds_per_page(self, pages: int) -> float:
        """Return the expected time per page to look up and fetch so many pages, in seconds."""
        return self._reading.seconds_per_page(pages)

    def look_up(self, keys: Sequence[bytes]) -> Lookup:
        """Begin to ask which of the pages with these keys, successive ones of a sequence, the store has."""
        return self._reading.look_up(keys)

    def fetch(self, pages: Sequence[tuple[int, bytes]], seconds_to_compute: float | None, waited: float) -> Fetch:
        """Begin to fill pages, given with their keys; see `Reading.fetch`. They must stay referenced."""
        return self._reading.fetch(pages, seconds_to_compute, waited)

    def give_up(self, fetch: Fetch) -> None:
        """Fetch no more pages, as nobody needs them. `fetched` returns them at once."""
        self._reading.give_up(fetch)

    def skip(self, fetch: Fetch, keys: Iterable[bytes]) -> None:
        """Do not fetch these pages, which the sequence computes. `fetched` returns them at once."""
        self._reading.skip(fetch, keys)

    def late(self) -> list[Fetch]:
        """Return, once, the fetches that sequences are not to wait for any longer."""
        return self._reading.late()

    def fetched(self) -> list[Finished]:
        """Return the pages that have arrived or were given up since the last call."""
        return self._reading.finished()

    def offer(self, keys: Iterable[bytes]) -> None:
        """Have the full pages with these keys, which are in the pool, written or kept longer."""
        self._writing.offer(keys)

    def begin_to_write(self, pool: PagePool, max_pages: int) -> list[int]:
        """Give the thread that writes its next pages, at most `max_pages`. Returns them; they have been acquired."""
        return self._writing.begin(pool, max_pages)

    def written(self) -> list[Finished]:
        """Return the acquired pages that are no longer needed since the last call."""
        return self._writing.finished()

    def close(self) -> None:
        """Close the store, and end the threads when their calls have returned."""
        self._reading.close()
        self._writing.close()
        self._store.close()

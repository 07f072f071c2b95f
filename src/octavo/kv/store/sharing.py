"""Sharing: the pages that an engine shares with others, through a store and directly."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from octavo.backends.base import Backend
from octavo.kv.page_pool import PagePool
from octavo.kv.peers.access import PeerAccess
from octavo.kv.peers.fetching import Peers
from octavo.kv.tiers.counts import TierCounts
from octavo.kv.transfers import Finished

from .health import Health
from .page_values import MAX_OVERHEAD, PageValues
from .reading import Fetch, Lookup, Reading
from .shared_pages import SharedPages
from .store import Store
from .writing import Writing

if TYPE_CHECKING:
    from octavo.formats.page_cipher import PageCipher
    from octavo.kv.peers.serving import PageServer

_log = logging.getLogger("octavo")


class Sharing:
    """Reads pages that other engines have computed, and gives them those of this engine. It never waits for others.

    All methods are for the engine's thread, but for `close`.

    Args:
        store: where pages are written and found; closed with this object. None: there is none.
        backend: exports and imports the content of pages.
        fingerprint: that of the engine.
        ttl: seconds that the store keeps a page after its last use.
        cipher: encrypts pages.
        access: for pages from engine to engine; None: there are none.
        on_change: called by threads when there is something to do before the next step.
    """

    def __init__(
        self,
        store: Store | None,
        backend: Backend,
        *,
        fingerprint: str,
        ttl: float,
        cipher: "PageCipher | None" = None,
        access: PeerAccess | None = None,
        on_change: Callable[[], None],
    ):
        self._store, self._backend, self._access = store, backend, access
        self._values = PageValues(fingerprint, backend.page_bytes, cipher)
        health = Health("fetching from other engines" if store is None else str(store))
        self._peers = None if access is None else Peers(access, backend.page_bytes + MAX_OVERHEAD)
        self._server: PageServer | None = None
        self._pages = SharedPages(self._values, store, self._peers)
        self._writing: Writing | None = None
        if store is not None:
            counts = self._pages.counts["store"]
            self._writing = Writing(store, self._values, backend, health, counts, ttl=ttl, on_change=on_change)
        self._reading = Reading(
            self._pages,
            backend,
            health,
            on_change=on_change,
            on_loss=_ignore if self._writing is None else self._writing.note_lacking,
            on_return=_ignore if self._writing is None else self._writing.forget,
        )

    @property
    def counts(self) -> dict[str, TierCounts]:
        """Return what was moved so far, by "store" and "peers". From any thread."""
        return self._pages.counts

    @property
    def is_available(self) -> bool:
        """Return whether the store can be asked for pages now."""
        return self._store is not None and self._reading.is_available

    @property
    def is_moving(self) -> bool:
        """Return whether a sequence waits for pages, or pages are being written that the store takes."""
        return self._reading.is_moving or (self._writing is not None and self._writing.is_moving)

    @property
    def pages_written(self) -> int:
        return 0 if self._writing is None else self._writing.pages_written

    @property
    def num_pending(self) -> int:
        """Return the number of pages that are being written, or wait for it."""
        return 0 if self._writing is None else self._writing.num_pending

    def seconds_per_page(self, pages: int) -> float:
        """Return the expected time per page to look up and fetch so many pages, in seconds."""
        return self._reading.seconds_per_page(pages)

    def serve(self, pool: PagePool) -> int:
        """Serve the pages of the pool to other engines. Return the port; 0 if there is no access, or no port."""
        if self._server is None and self._access is not None:
            from octavo.kv.peers.serving import PageServer  # imported late, with ZeroMQ

            try:
                counts = self._pages.counts["peers"]
                self._server = PageServer(self._access, pool, self._backend, self._values, counts)
            except OSError as error:
                _log.warning("pages cannot be served to other engines: %s", error.strerror or error)
        return 0 if self._server is None else self._server.port

    def expect(self, address: str, keys: Sequence[bytes]) -> None:
        """Note that the engine at an address has the pages with these keys."""
        if self._peers is not None:
            self._peers.expect(address, keys)

    def may_have(self, key: bytes) -> bool:
        """Return whether somebody can be asked for a page now."""
        return self.is_available or bool(self._pages.held_by_peers([key]))

    def look_up(self, keys: Sequence[bytes]) -> Lookup | None:
        """Begin to ask who has the pages with these keys, successive ones of a sequence; None if nobody has any.

        The store is not asked if other engines have them all.
        """
        held = self._pages.held_by_peers(keys)
        if len(held) < len(keys) and self.is_available:
            return self._reading.look_up(keys)
        return Lookup(keys, frozenset(held), is_done=True, is_answered=True) if held else None

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
        """Have the full pages with these keys, which are in the pool, written or kept longer in the store."""
        if self._writing is not None:
            self._writing.offer(keys)

    def begin_to_write(self, pool: PagePool, max_pages: int) -> list[int]:
        """Give the thread that writes its next pages, at most `max_pages`. Returns them; they have been acquired."""
        return [] if self._writing is None else self._writing.begin(pool, max_pages)

    def written(self) -> list[Finished]:
        """Return the acquired pages that are no longer needed since the last call."""
        return [] if self._writing is None else self._writing.finished()

    def close(self) -> None:
        """Close the store, and end the threads when their calls have returned."""
        if self._server is not None:
            self._server.close()
        self._reading.close()
        if self._writing is not None:
            self._writing.close()
        if self._store is not None:
            self._store.close()


def _ignore(*_: object) -> None:
    pass

"""Gives sequences their pages, and finds what is already computed: the prefix cache.

Because a token's K and V are bitwise the same however they came about, a page found is as good as a page computed, and
a page lost costs time only; a fork is just a sequence whose prefix is found.
"""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .page_pool import PagePool
from .partial_pages import PartialPages
from .prefix import Prefix
from .transfers import Finished, Transfers

SAVING_SHARE = 8  # at most one page in so many is held only because it is being saved


@dataclass(slots=True)
class SequencePages:
    """The pages of one sequence, in order of position; the first `num_full` are full, computed and published."""

    prefix: Prefix
    pages: list[int] = field(default_factory=list)
    num_full: int = 0


@dataclass(slots=True)
class Prefetch:
    """Pages of a waiting sequence that are held for it while `pending` of them are on their way from a lower tier."""

    pages: list[int]
    pending: int = 0


class KVCache:
    """Page tables over one PagePool, and over the tiers that `transfers` reaches. `page_size` is in tokens.

    `copy_page(source, target)` copies a page on the device; without it, partial pages are not kept.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        prefix_caching: bool = True,
        copy_page: Callable[[int, int], None] | None = None,
        transfers: Transfers | None = None,
    ):
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.transfers = transfers if prefix_caching else None
        self._saves = self.transfers is not None and self.transfers.has_stores
        self._copy_page = copy_page
        self._partial = PartialPages(self.pool)
        self._pins: OrderedDict[str, list[int]] = OrderedDict()  # by the id of a KV state, least recently used first
        self._unsaved: deque[tuple[int, bytes]] = deque()
        self._max_saving = max(1, num_pages // SAVING_SHARE)
        self._num_saving = 0
        self._fetching: dict[int, Prefetch] = {}  # by page

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def admit(self, prefix: Prefix, spare: int = 0) -> tuple[SequencePages, int] | None:
        """Pages for a new sequence of these tokens, and how many tokens of it are already computed.

        At least the last token is left to compute: its logits are wanted. None, and nothing held, if the pages that
        all of the tokens need are not to be had now with `spare` pages to remain.
        """
        held = self._hold_prefix(prefix)
        missing = self.pages_for(len(prefix.tokens)) - held.num_full + spare
        tail, tail_length = self._find_tail(held)
        if tail is not None:
            self.pool.hold(tail)
            if not self._make_room(missing):  # without it there may be
                self.pool.release(tail)
                tail, tail_length = None, 0
        if not self._make_room(missing):
            self._drop(held.pages)
            return None
        self.grow(held, len(prefix.tokens))
        if tail is not None and self._copy_page is not None:
            self._copy_page(tail, held.pages[held.num_full])  # the original stays, for other forks
            self.pool.release(tail)
        if self.transfers is not None and self._saves:
            self.transfers.use([prefix.key(i) for i in range(held.num_full)])
        return held, held.num_full * self.page_size + tail_length

    def grow(self, held: SequencePages, num_tokens: int) -> bool:
        """Take pages until `num_tokens` tokens have room. False, and nothing taken, if too few are to be had."""
        missing = self.pages_for(num_tokens) - len(held.pages)
        if missing > 0:
            if not self._make_room(missing):
                return False
            held.pages.extend(self.pool.take() for _ in range(missing))
        return True

    def commit(self, held: SequencePages, num_computed: int) -> None:
        """K and V of the first `num_computed` tokens are in the pages now: publish those that became full."""
        if not self.prefix_caching:
            return
        while held.num_full < num_computed // self.page_size:
            page, key = held.pages[held.num_full], held.prefix.key(held.num_full)
            self.pool.publish(page, key)
            held.num_full += 1
            if self._saves:
                self._unsaved.append((page, key))

    def release(self, held: SequencePages, num_computed: int = 0) -> None:
        """Let go of all pages. If K and V of `num_computed` tokens are in them, a partial last page is cached too."""
        self.commit(held, num_computed)
        start = held.num_full * self.page_size
        if self.prefix_caching and self._copy_page is not None and start < num_computed:
            parent = held.prefix.parent(held.num_full)
            self._partial.add(held.pages[held.num_full], parent, held.prefix.tokens[start:num_computed])
        self._drop(held.pages)
        held.pages.clear()
        held.num_full = 0

    def pin(self, id: str, prefix: Prefix) -> None:
        """Keep what is computed of a KV state's tokens until `unpin`, or until running sequences need the room."""
        self.unpin(id)
        held = self._hold_prefix(prefix)
        tail, _ = self._find_tail(held)
        if tail is not None:
            self.pool.hold(tail)
            held.pages.append(tail)
        self._pins[id] = held.pages

    def unpin(self, id: str) -> None:
        self._drop(self._pins.pop(id, []))

    def prefetch(self, prefix: Prefix, spare: int = 0) -> Prefetch | None:
        """Start to bring in what lower tiers have of these tokens, and hold it; None if there is nothing to bring.

        None too if the pages for it are not to be had with `spare` to remain.
        """
        if self.transfers is None:
            return None
        pages: list[int] = []
        missing: list[bytes] = []
        for i in range((len(prefix.tokens) - 1) // self.page_size):
            key = prefix.key(i)
            if (page := self.pool.find(key)) is not None:
                self.pool.hold(page)
                pages.append(page)
            elif self.transfers.holds(key):
                missing.append(key)
            else:
                break
        if not missing or not self._make_room(len(missing) + spare):
            self._drop(pages)
            return None
        prefetch = Prefetch(pages)
        for key in missing:
            page = self.pool.take()  # held by the transfer too, since the sequence may be gone before that ends
            if self.transfers.fetch(page, key):
                self.pool.hold(page)
                pages.append(page)
                prefetch.pending += 1
                self._fetching[page] = prefetch
            else:  # lost meanwhile
                self.pool.release(page)
        return prefetch

    def end_prefetch(self, prefetch: Prefetch) -> None:
        """Its sequence is admitted or gone."""
        self._drop(prefetch.pages)
        prefetch.pages.clear()

    def collect(self) -> None:
        """Take in what transfers have done, and hand them what there is to save."""
        if self.transfers is None:
            return
        for done in self.transfers.finished():
            if prefetch := self._fetching.pop(done.page, None):
                self._arrived(done, prefetch)
            else:
                self._num_saving -= 1
            self.pool.release(done.page)
        most = min(self._max_saving, self.transfers.max_saves)
        while self._unsaved and self._num_saving < most:
            page, key = self._unsaved.popleft()
            if self.pool.find(key) == page:
                self.pool.hold(page)
                if self.transfers.save(page, key):
                    self._num_saving += 1
                else:  # the tiers have it
                    self.pool.release(page)

    def wait(self, timeout: float) -> None:
        """Until a page on the move has arrived, at most `timeout` seconds."""
        if self.transfers is not None and self.is_moving:
            self.transfers.wait(timeout)

    def flush(self, timeout: float) -> None:
        """Save what there is to save, for at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.is_moving and time.monotonic() < deadline:
            self.wait(0.05)
            self.collect()

    @property
    def seconds_per_page(self) -> float:
        """Measured, of fetches from lower tiers."""
        return self.transfers.seconds_per_page if self.transfers is not None else math.inf

    def _arrived(self, done: Finished, prefetch: Prefetch) -> None:
        prefetch.pending -= 1
        if done.ok:
            self.pool.publish(done.page, done.key)
        if self.pool.find(done.key) != done.page and done.page in prefetch.pages:  # of no use, and others need room
            prefetch.pages.remove(done.page)
            self.pool.release(done.page)

    def is_fetching(self, page: int) -> bool:
        return page in self._fetching

    def pinned_pages(self) -> set[int]:
        """Of KV states. From any thread."""
        return {page for pages in list(self._pins.values()) for page in pages}

    @property
    def num_fetching(self) -> int:
        return len(self._fetching)

    @property
    def is_moving(self) -> bool:
        """Whether pages are on their way from or to a lower tier, or waiting to be."""
        return bool(self._fetching or self._unsaved or self._num_saving)

    def _hold_prefix(self, prefix: Prefix) -> SequencePages:
        """Hold the pages of the pool that begin these tokens, all but the last token."""
        held = SequencePages(prefix)
        if self.prefix_caching:
            while (held.num_full + 1) * self.page_size < len(prefix.tokens):
                page = self.pool.find(prefix.key(held.num_full))
                if page is None:
                    break
                self.pool.hold(page)
                held.pages.append(page)
                held.num_full += 1
        return held

    def _find_tail(self, held: SequencePages) -> tuple[int | None, int]:
        """A partial page that goes on where the full pages of `held` end, and how many tokens it has of the prefix."""
        if not self.prefix_caching or self._copy_page is None:
            return None, 0
        tokens, start = held.prefix.tokens, held.num_full * self.page_size
        end = min(start + self.page_size, len(tokens) - 1)
        return self._partial.find(held.prefix.parent(held.num_full), tokens[start:end])

    def _make_room(self, pages: int) -> bool:
        """Whether so many pages can be taken, pins being given up for it, the least recently used first."""
        while self.pool.num_available < pages and self._pins:
            self._drop(self._pins.popitem(last=False)[1])
        return self.pool.num_available >= pages

    def _drop(self, pages: list[int]) -> None:
        """The last goes first, so that a prefix outlives what followed it."""
        for page in reversed(pages):
            self.pool.release(page)

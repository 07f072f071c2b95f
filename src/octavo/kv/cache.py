"""KVCache: page tables of sequences over one PagePool, and the prefix cache.

A token's K and V are bitwise the same however they were computed. So a cached page is the same as a newly computed one,
losing a page costs only time, and forking a sequence is finding its prefix in the cache.
"""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .page_pool import PagePool
from .partial_pages import PartialPages
from .prefix import KEY_BYTES, Prefix
from .tiers.counts import TierCounts, total_counts
from .transfers import Finished, Transfers

if TYPE_CHECKING:
    from .store.reading import Fetch, Lookup
    from .store.sharing import Sharing

SAVING_SHARE = 8  # at most one page in this many is referenced only because it is being saved


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence, in order of position. The first `num_full` are full, computed and published.

    Page number `last_given` has the last of the tokens for which the table was allocated: the end of the prompt.
    `fetch` brings pages from the shared store while the sequence is computed.
    """

    prefix: Prefix
    pages: list[int] = field(default_factory=list)
    num_full: int = 0
    last_given: int = -1
    fetch: "Fetch | None" = None


@dataclass(frozen=True, slots=True)
class PageContent:
    """What a page is: the key of the page before it, the root of its sequence, and its tokens as bytes (int32)."""

    parent: bytes
    root: bytes
    tokens: bytes


@dataclass(slots=True)
class Prefetch:
    """The acquired pages of a waiting sequence.

    `pending` of them are still being filled from lower tiers, those of `fetch` from the shared store.
    """

    pages: list[int]
    pending: int = 0
    fetch: "Fetch | None" = None


class KVCache:
    """Allocates and finds the pages of sequences. Not thread-safe, except for methods marked "from any thread".

    Args:
        num_pages: number of pages in the pool.
        page_size: tokens per page.
        prefix_caching: whether to keep computed pages for later sequences.
        copy_page: copies the content of one page into another on the device, as copy_page(source, target); if None,
            partial pages are not kept.
        transfers: moves pages to and from the tiers below the pool; None if there are no tiers.
        sharing: shares pages with other engines, through a store or directly; None if neither is possible.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        prefix_caching: bool = True,
        copy_page: Callable[[int, int], None] | None = None,
        transfers: Transfers | None = None,
        sharing: "Sharing | None" = None,
    ):
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.transfers = transfers if prefix_caching else None
        self.sharing = sharing if prefix_caching else None
        self._saves = self.transfers is not None and self.transfers.has_stores
        self._copy_page = copy_page
        self._partial = PartialPages(self.pool)
        self._pins: OrderedDict[str, list[int]] = OrderedDict()  # by the id of a KV state, least recently used first
        self._unsaved: deque[tuple[int, bytes]] = deque()
        self._max_saving = max(1, num_pages // SAVING_SHARE)
        self._saving: set[int] = set()  # pages
        self._writing: set[int] = set()  # pages on their way to the shared store
        self._fetching: dict[int, Prefetch] = {}  # by page
        self._behind: set[Fetch] = set()  # those of sequences that are being computed
        self._nobody = Prefetch([])  # stands for the sequence of pages that no sequence waits for
        self._content: dict[bytes, PageContent] | None = None  # of pages that are published or fetched, by key

    def pages_for(self, num_tokens: int) -> int:
        """Return the number of pages that `num_tokens` tokens need."""
        return pages_for(num_tokens, self.page_size)

    def allocate(self, prefix: Prefix, reserve: int = 0, max_cached: int | None = None) -> tuple[PageTable, int] | None:
        """Allocate pages for all tokens of a sequence, reusing cached ones.

        At least the last token is left to compute, since its logits are needed.

        Args:
            reserve: number of pages that must remain available.
            max_cached: maximum number of tokens for which cached pages are reused; None for no limit.

        Returns:
            The page table, and the number of its tokens that are already computed; None if too few pages are available.
        """
        last = len(prefix.tokens) - 1
        most = last if max_cached is None else min(max_cached, last)
        table = self._match_prefix(prefix, most)
        missing = self.pages_for(len(prefix.tokens)) - table.num_full + reserve
        partial, partial_length = self._match_partial(table, most)
        if partial is not None:
            self.pool.acquire(partial)
            if not self._reclaim(missing):  # releasing the partial page may free enough
                self.pool.release(partial)
                partial, partial_length = None, 0
        if not self._reclaim(missing):
            self._release_all(table.pages)
            return None
        self.extend(table, len(prefix.tokens))
        table.last_given = len(table.pages) - 1
        if partial is not None and self._copy_page is not None:
            self._copy_page(partial, table.pages[table.num_full])  # the original stays, for other forks
            self.pool.release(partial)
        if self.transfers is not None and self._saves:
            self.transfers.touch([prefix.key(i) for i in range(table.num_full)])
        if self.sharing is not None:
            self.sharing.offer([prefix.key(i) for i in range(table.num_full)])
        return table, table.num_full * self.page_size + partial_length

    def extend(self, table: PageTable, num_tokens: int) -> bool:
        """Allocate pages until the table holds `num_tokens` tokens.

        Returns False, and allocates nothing, if too few pages are available.
        """
        missing = self.pages_for(num_tokens) - len(table.pages)
        if missing > 0:
            if not self._reclaim(missing):
                return False
            table.pages.extend(self.pool.allocate() for _ in range(missing))
        return True

    def commit(self, table: PageTable, num_computed: int) -> None:
        """Publish the pages that have become full, now that K and V of the first `num_computed` tokens are computed."""
        if not self.prefix_caching:
            return
        while table.num_full < num_computed // self.page_size:
            page, key = table.pages[table.num_full], table.prefix.key(table.num_full)
            if self.pool.publish(page, key):
                self._note_content(table.prefix, table.num_full)
            if table.num_full == table.last_given and self._copy_page is not None:
                self._index_full(table, key)
            table.num_full += 1
            if self._saves:
                self._unsaved.append((page, key))
            if self.sharing is not None:
                self.sharing.offer([key])

    def release(self, table: PageTable, num_computed: int = 0) -> None:
        """Release all pages of a sequence. If `num_computed` tokens end within a page, that page is cached too."""
        self.commit(table, num_computed)
        if table.fetch is not None:
            self._give_up(table.fetch)
            table.fetch = None
        start = table.num_full * self.page_size
        if self.prefix_caching and self._copy_page is not None and start < num_computed:
            parent = table.prefix.parent(table.num_full)
            self._partial.add(table.pages[table.num_full], parent, table.prefix.tokens[start:num_computed])
        self._release_all(table.pages)
        table.pages.clear()
        table.num_full = 0

    def pin(self, id: str, prefix: Prefix) -> None:
        """Acquire the computed pages of KV state `id`, until `unpin` or until sequences need the pages."""
        self.unpin(id)
        most = len(prefix.tokens) - 1
        table = self._match_prefix(prefix, most)
        partial, _ = self._match_partial(table, most)
        if partial is not None:
            self.pool.acquire(partial)
            table.pages.append(partial)
        self._pins[id] = table.pages

    def unpin(self, id: str) -> None:
        """Release the pages of KV state `id`, if there are any."""
        self._release_all(self._pins.pop(id, []))

    def reset(self) -> bool:
        """Evict all cached pages of the pool, those of KV states too. The tiers below the pool keep theirs.

        Returns False, and evicts nothing, if sequences or transfers use pages.
        """
        if self.pool.num_pages - self.pool.num_available > len(self.pinned_pages()):
            return False
        for id in list(self._pins):
            self.unpin(id)
        self.pool.evict_all()
        return True

    def unknown_keys(self, prefix: Prefix) -> list[bytes]:
        """Return the keys of the full pages of these tokens, from the first one that neither pool nor tiers have."""
        num_full = (len(prefix.tokens) - 1) // self.page_size
        for i in range(num_full):
            key = prefix.key(i)
            if self.pool.find(key) is None and not self._tier_has(key):
                return [prefix.key(k) for k in range(i, num_full)]
        return []

    def prefetch(
        self,
        prefix: Prefix,
        reserve: int = 0,
        *,
        from_tiers: bool = True,
        lookup: "Lookup | None" = None,
        seconds_to_compute: float | None = None,
    ) -> Prefetch | None:
        """Acquire the pages of these tokens, and begin to fetch those that only lower tiers or the shared store have.

        Args:
            reserve: number of pages that must remain available.
            from_tiers: whether to fetch what the tiers have.
            lookup: what the store has; None: nothing is fetched from it.
            seconds_to_compute: time in which a page would be computed; see `Sharing.fetch`.

        Returns None if there is nothing to fetch, or if too few pages are available.
        """
        if not self.has_tiers:
            return None
        in_store = lookup.found if lookup is not None else frozenset[bytes]()
        pages: list[int] = []
        missing: list[bytes] = []
        for i in range((len(prefix.tokens) - 1) // self.page_size):
            key = prefix.key(i)
            if (page := self.pool.find(key)) is not None:
                self.pool.acquire(page)
                pages.append(page)
            elif (from_tiers and self._tier_has(key)) or key in in_store:
                missing.append(key)
                self._note_content(prefix, i)
            else:
                break
        if not missing or not self._reclaim(len(missing) + reserve):
            self._release_all(pages)
            return None
        prefetch = Prefetch(pages)
        shared: list[tuple[int, bytes]] = []
        for key in missing:
            page = self.pool.allocate()  # the transfer's own reference, as the sequence may end before it
            if from_tiers and self.transfers is not None and self.transfers.fetch(page, key):
                pass
            elif key in in_store:
                shared.append((page, key))
            else:  # the tier has lost the page in the meantime
                self.pool.release(page)
                continue
            self.pool.acquire(page)
            pages.append(page)
            prefetch.pending += 1
            self._fetching[page] = prefetch
        if shared and self.sharing is not None:
            waited = lookup.seconds if lookup is not None else 0.0
            prefetch.fetch = self.sharing.fetch(shared, seconds_to_compute, waited)
        return prefetch

    def end_prefetch(self, prefetch: Prefetch, admitted: PageTable | None = None) -> None:
        """Release the prefetched pages of a sequence that no longer waits.

        If it is admitted, with the table `admitted`, what is late goes on to be fetched.
        """
        fetch, prefetch.fetch = prefetch.fetch, None
        if fetch is not None and fetch.left:
            if admitted is not None:
                admitted.fetch = fetch
                self._behind.add(fetch)
            else:
                self._give_up(fetch)
        self._release_all(prefetch.pages)
        prefetch.pages.clear()

    def adopt(self, table: PageTable, num_computed: int) -> tuple[PageTable, int]:
        """Use pages that the pool has received since the sequence was admitted, in place of those to compute next.

        Returns the page table, another object if it has changed, and the number of tokens that are computed then. At
        least the last token is left.
        """
        first = found = num_computed // self.page_size
        while (found + 1) * self.page_size < len(table.prefix.tokens):
            page = self.pool.find(table.prefix.key(found))
            if page is None:
                break
            self.pool.acquire(page)
            self.pool.release(table.pages[found])
            table.pages[found] = page
            found += 1
        if found == first:
            return table, num_computed
        if table.num_full == first:  # otherwise `commit` comes to them after the pages that are being computed
            table.num_full = found
        return replace(table), found * self.page_size

    def fetch_behind(
        self, table: PageTable, num_tokens: int, lookup: "Lookup | None", reserve: int, seconds_to_compute: float | None
    ) -> None:
        """Fetch pages of a sequence from the shared store while its first `num_tokens` tokens are computed.

        Args:
            lookup: begins a fetch of what the store has, if enough pages are available; None: a fetch may go on.
            reserve: number of pages that must remain available.
        """
        if self.sharing is None:
            return
        first = num_tokens // self.page_size
        if table.fetch is not None:
            computed = [table.prefix.key(i) for i in range(table.num_full, first)]
            there = [key for key in list(table.fetch.left) if self.pool.find(key) is not None]
            self.sharing.skip(table.fetch, computed + there)
            self._end_fetches(self.sharing.fetched())
        elif lookup is not None:
            numbers = range(first, (len(table.prefix.tokens) - 1) // self.page_size)
            keys = {key: i for i in numbers if (key := table.prefix.key(i)) in lookup.found}
            missing = [key for key in keys if self.pool.find(key) is None]
            if not missing or self.pool.num_available < len(missing) + reserve:
                return
            for key in missing:
                self._note_content(table.prefix, keys[key])
            pages = [(self.pool.allocate(), key) for key in missing]
            self._fetching.update((page, self._nobody) for page, _ in pages)
            table.fetch = self.sharing.fetch(pages, seconds_to_compute, 0.0)
            table.fetch.is_late = True
            self._behind.add(table.fetch)

    def collect(self) -> None:
        """Publish the pages of finished fetches, and begin to save pages that have become full."""
        self._collect_shared()
        if self.transfers is None:
            return
        for done in self.transfers.finished():
            if prefetch := self._fetching.pop(done.page, None):
                self._finish_fetch(done, prefetch)
            else:
                self._saving.discard(done.page)
            self.pool.release(done.page)
        most = min(self._max_saving, self.transfers.max_saves)
        while self._unsaved and len(self._saving) < most:
            page, key = self._unsaved.popleft()
            if self.pool.find(key) == page and page not in self._saving:
                self.pool.acquire(page)
                if self.transfers.save(page, key):
                    self._saving.add(page)
                else:  # the tiers have it
                    self.pool.release(page)

    def wait(self, timeout: float) -> None:
        """Wait until a transfer finishes, for at most `timeout` seconds; return at once if there is none."""
        if self.transfers is not None and self.is_moving:
            self.transfers.wait(timeout)

    def flush(self, timeout: float) -> None:
        """Save all full pages that are not saved yet, for at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.is_moving and time.monotonic() < deadline:
            self.wait(0.05)
            self.collect()

    def watch(self, with_content: bool) -> list[bytes]:
        """Begin to record which full pages are gained and lost, and with `with_content` what they are.

        Return the keys of those that there are now.
        """
        self.pool.watch()
        self._content = {} if with_content else None
        return [key for key in self.pool.keys if len(key) == KEY_BYTES]

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Return the keys of full pages that were gained and lost since the last call."""
        changes = {key: is_there for key, is_there in self.pool.take_changes().items() if len(key) == KEY_BYTES}
        gained = [key for key, is_there in changes.items() if is_there]
        lost = [key for key, is_there in changes.items() if not is_there]
        self.take_content(lost)
        return gained, lost

    def take_content(self, keys: Iterable[bytes]) -> dict[bytes, PageContent]:
        """Return, once, what the pages with these keys are, as far as it is recorded."""
        content = self._content or {}
        return {key: content.pop(key) for key in keys if key in content}

    def _note_content(self, prefix: Prefix, page: int) -> None:
        if self._content is not None:
            tokens = prefix.tokens[page * self.page_size : (page + 1) * self.page_size]
            content = PageContent(prefix.parent(page), prefix.parent(0), tokens.tobytes())
            self._content[prefix.key(page)] = content

    @property
    def seconds_per_page(self) -> float:
        """Return the measured time to fetch a page from a lower tier, in seconds; infinity if there is none."""
        return self.transfers.seconds_per_page if self.transfers is not None and self.transfers.has_tiers else math.inf

    @property
    def num_pending_saves(self) -> int:
        """Return the number of pages that are being saved to tiers, or are to be written to the shared store."""
        pending = self.transfers.pending_saves if self.transfers is not None else 0
        return pending + (self.sharing.num_pending if self.sharing is not None else 0)

    @property
    def pages_saved(self) -> int:
        """Return the number of pages saved to tiers so far, and of those written to the shared store."""
        saved = self.transfers.pages_saved if self.transfers is not None else 0
        return saved + (self.sharing.pages_written if self.sharing is not None else 0)

    @property
    def pages_fetched(self) -> int:
        """Return the number of pages fetched from tiers, the shared store and other engines so far."""
        fetched = self.transfers.pages_fetched if self.transfers is not None else 0
        return fetched + sum(counts.hits for counts in self.sharing.counts.values()) if self.sharing else fetched

    def tier_counts(self) -> dict[str, TierCounts]:
        """Return what has been moved so far, by the name of the tier. From any thread."""
        counts = {} if self.transfers is None else self.transfers.counts.copy()
        if self.sharing is not None:
            counts |= self.sharing.counts
        return total_counts([counts])

    @property
    def has_tiers(self) -> bool:
        """Return whether there is currently a tier, or a shared store, that may have pages."""
        return self.sharing is not None or (self.transfers is not None and self.transfers.has_tiers)

    def is_fetching(self, page: int) -> bool:
        """Return whether the page is being filled from a lower tier."""
        return page in self._fetching

    def moving_pages(self) -> tuple[Collection[int], Collection[int]]:
        """Return the pages that are being filled from a lower tier, and those being saved to one."""
        return self._fetching.keys(), self._saving | self._writing

    def pinned_pages(self) -> set[int]:
        """Return the pages that KV states reference. From any thread."""
        return {page for pages in list(self._pins.values()) for page in pages}

    @property
    def num_fetching(self) -> int:
        """Return the number of pages being filled from a lower tier."""
        return len(self._fetching)

    @property
    def is_moving(self) -> bool:
        """Return whether pages are being fetched or saved, or wait to be saved."""
        if self.sharing is not None and self.sharing.is_moving:
            return True
        return bool(self._fetching or self._unsaved or self._saving)

    def _tier_has(self, key: bytes) -> bool:
        return self.transfers is not None and self.transfers.tier_of(key) is not None

    def _collect_shared(self) -> None:
        """Publish the pages that have come from the shared store, and begin to write others to it."""
        if self.sharing is None:
            return
        self._end_fetches(self.sharing.fetched())
        for fetch in self.sharing.late():
            self._let_go(fetch)
        for done in self.sharing.written():
            self._writing.discard(done.page)
            self.pool.release(done.page)
        if (most := self._max_saving - len(self._writing)) > 0:
            self._writing.update(self.sharing.begin_to_write(self.pool, most))

    def _let_go(self, fetch: "Fetch") -> None:
        """Have a sequence wait no longer for the pages that are left of a fetch, which goes on."""
        if not (left := set(fetch.left.values())):
            return
        prefetch = self._fetching[next(iter(left))]
        prefetch.pending -= len(left)
        prefetch.pages = [page for page in prefetch.pages if page not in left]
        for page in left:
            self._fetching[page] = self._nobody
            self.pool.release(page)

    def _give_up(self, *fetches: "Fetch") -> None:
        if self.sharing is not None:
            for fetch in fetches:
                self.sharing.give_up(fetch)
            self._behind.difference_update(fetches)
            self._end_fetches(self.sharing.fetched())

    def _end_fetches(self, finished: Iterable[Finished]) -> None:
        for done in finished:
            self._finish_fetch(done, self._fetching.pop(done.page))
            self.pool.release(done.page)

    def _finish_fetch(self, done: Finished, prefetch: Prefetch) -> None:
        prefetch.pending -= 1
        is_there = (done.ok and self.pool.publish(done.page, done.key)) or self.pool.find(done.key) is not None
        if not is_there and self._content:
            self._content.pop(done.key, None)
        # Release a page whose fetch failed, or whose content another page has received in the meantime.
        if self.pool.find(done.key) != done.page and done.page in prefetch.pages:
            prefetch.pages.remove(done.page)
            self.pool.release(done.page)

    def _index_full(self, table: PageTable, key: bytes) -> None:
        """Index the published page that has the end of the prompt, so that it is found by a part of its tokens."""
        page, start = self.pool.find(key), table.num_full * self.page_size
        assert page is not None
        tokens = table.prefix.tokens[start : start + self.page_size]
        self._partial.add(page, table.prefix.parent(table.num_full), tokens, key)

    def _match_prefix(self, prefix: Prefix, most: int) -> PageTable:
        """Acquire the pages of the pool that begin these tokens, with at most `most` tokens."""
        table = PageTable(prefix)
        if self.prefix_caching:
            while (table.num_full + 1) * self.page_size <= most:
                page = self.pool.find(prefix.key(table.num_full))
                if page is None:
                    break
                self.pool.acquire(page)
                table.pages.append(page)
                table.num_full += 1
        return table

    def _match_partial(self, table: PageTable, most: int) -> tuple[int | None, int]:
        """Return an indexed page that continues the full pages of `table`, and how many of its tokens can be used.

        Together with the full pages, these are at most `most` tokens.
        """
        if not self.prefix_caching or self._copy_page is None:
            return None, 0
        tokens, start = table.prefix.tokens, table.num_full * self.page_size
        end = max(start, min(start + self.page_size, most))
        return self._partial.find(table.prefix.parent(table.num_full), tokens[start:end])

    def _reclaim(self, pages: int) -> bool:
        """Give up late fetches and unpin KV states until `pages` pages are available. Return whether they are."""
        if self._behind and self.pool.num_available < pages:
            self._give_up(*self._behind)
        while self.pool.num_available < pages and self._pins:
            self._release_all(self._pins.popitem(last=False)[1])
        return self.pool.num_available >= pages

    def _release_all(self, pages: list[int]) -> None:
        """Release pages, the last one first, so that the pages of a prefix are evicted after the pages that follow."""
        for page in reversed(pages):
            self.pool.release(page)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Return the number of pages of `page_size` tokens that hold so many tokens."""
    return -(-num_tokens // page_size)

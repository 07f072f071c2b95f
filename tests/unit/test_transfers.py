"""Pages on their way between a real pool and the tiers below it."""

import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from octavo.backends.base import Backend
from octavo.formats.page_file import page_file_bytes
from octavo.kv import KVCache, Prefix, root_key
from octavo.kv.tiers.disk import DiskTier
from octavo.kv.tiers.host import HostTier
from octavo.kv.transfers import Finished, Transfers
from octavo.states.file import StateFile, save_state
from random_model import PLAIN, TOKENS, load
from step_batches import run_chunks, step_batch

KEYS = [bytes([k]) * 16 for k in range(10)]
PAGES = 10


class GatedTier:
    """A slow disk, as slow as a test wants it: reads and writes wait for a gate."""

    name = "gated"
    refused = 0

    def __init__(self) -> None:
        self.pages: dict[bytes, np.ndarray] = {}
        self.gate = threading.Event()
        self.arrived = threading.Semaphore(0)  # once per call that has come to the gate

    def __contains__(self, key: bytes) -> bool:
        return key in self.pages

    def read(self, key: bytes) -> np.ndarray | None:
        self._pass()
        return self.pages.get(key)

    def write(self, key: bytes, content: np.ndarray) -> bool:
        self._pass()
        self.pages[key] = content.copy()
        return True

    def touch(self, key: bytes) -> bool:
        return key in self

    def close(self) -> None:
        pass

    def _pass(self) -> None:
        self.arrived.release()
        assert self.gate.wait(30)


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = load(PLAIN, pages=PAGES)
    yield backend
    backend.close()


def numbered(backend: Backend) -> None:
    """Fill page p with bytes p."""
    for page in range(PAGES):
        backend.import_page(page, np.full(backend.page_bytes, page, np.uint8))


def collect(transfers: Transfers, count: int) -> list[Finished]:
    finished: list[Finished] = []
    while len(finished) < count:
        assert transfers.wait(30), "a transfer does not end"
        finished += transfers.finished()
    return finished


def test_pages_survive_a_restart_bitwise(tmp_path: Path) -> None:
    """Saved by one engine's backend, fetched by the next one's, into other pages: the same logits."""
    first = load(PLAIN)
    run_chunks(first, TOKENS[:70], 64, [5, 0, 7])
    expected = first.logits(step_batch([(TOKENS[70:71], 70, [5, 0, 7])]))
    transfers = Transfers(first, [DiskTier(tmp_path, 10**9, first.page_bytes)])
    for page, key in zip([5, 0, 7], KEYS, strict=False):
        assert transfers.save(page, key)
    transfers.close()  # which ends what was asked for
    first.close()

    second = load(PLAIN)
    transfers = Transfers(second, [DiskTier(tmp_path, 10**9, second.page_bytes)])
    for page, key in zip([1, 2, 3], KEYS, strict=False):
        assert transfers.fetch(page, key)
    assert all(transfer.ok for transfer in collect(transfers, 3))
    np.testing.assert_array_equal(second.logits(step_batch([(TOKENS[70:71], 70, [1, 2, 3])])), expected)
    transfers.close()


def test_a_page_goes_to_every_tier_and_comes_from_the_first(backend: Backend, tmp_path: Path) -> None:
    numbered(backend)
    host, disk = HostTier(2 * backend.page_bytes), DiskTier(tmp_path, 10**9, backend.page_bytes)
    transfers = Transfers(backend, [host, disk])
    for page in range(4):
        assert transfers.save(page, KEYS[page])
    assert {(event.kind, event.page, event.key, event.ok) for event in collect(transfers, 4)} == {
        ("save", page, KEYS[page], True) for page in range(4)
    }
    held = [transfers.tier_of(key) for key in KEYS[:5]]
    assert sorted(map(str, [tier.name for tier in held if tier])) == ["disk", "disk", "host", "host"]
    assert held[4] is None
    again = next(key for key in KEYS[:4] if key in host)
    assert not transfers.save(KEYS.index(again), again), "all tiers have it"
    for page in range(4):
        assert transfers.fetch(page + 5, KEYS[page])
    collect(transfers, 4)
    assert [backend.export_page(page + 5)[0] for page in range(4)] == [0, 1, 2, 3]
    assert not transfers.fetch(9, KEYS[7]), "nobody has it"
    counts = (transfers.pages_saved, transfers.pages_fetched, transfers.failures, transfers.pending_saves)
    assert counts == (4, 4, 0, 0)
    transfers.close()


def test_pages_used_in_the_pool_stay_below_the_first_longest(backend: Backend, tmp_path: Path) -> None:
    numbered(backend)
    size = backend.page_bytes
    tiers = [HostTier(4 * size), DiskTier(tmp_path, 4 * page_file_bytes(size), size)]
    transfers = Transfers(backend, tiers, threads=1)
    for page in range(4):
        assert transfers.save(page, KEYS[page])
    transfers.touch(KEYS[:2])
    for page in range(4, 7):
        assert transfers.save(page, KEYS[page])
    collect(transfers, 7)
    for tier in tiers:
        assert [key in tier for key in KEYS[:7]] == [True, False, False, False, True, True, True]
    transfers.close()


def test_lost_and_damaged_pages(backend: Backend, tmp_path: Path) -> None:
    numbered(backend)
    host, disk = HostTier(10**6), DiskTier(tmp_path, 10**9, backend.page_bytes)
    for key in KEYS[:2]:
        disk.write(key, backend.export_page(3))
    for file in tmp_path.rglob("*.page"):
        file.write_bytes(file.read_bytes()[:-1])
    host.write(KEYS[1], backend.export_page(4))
    transfers = Transfers(backend, [disk, host])
    assert transfers.fetch(0, KEYS[0]) and transfers.fetch(1, KEYS[1])
    assert {(event.page, event.ok) for event in collect(transfers, 2)} == {(0, False), (1, True)}
    assert backend.export_page(1)[0] == 4, "the next tier stands in"
    assert backend.export_page(0)[0] == 0, "a page that was not fetched is not touched"
    assert transfers.tier_of(KEYS[0]) is None
    assert transfers.failures == 1
    transfers.close()


def test_no_caller_waits_and_fetches_go_first(backend: Backend) -> None:
    numbered(backend)
    tier = GatedTier()
    tier.pages[KEYS[8]] = np.full(backend.page_bytes, 88, np.uint8)
    transfers = Transfers(backend, [tier], threads=1, max_saves=3)
    began = time.monotonic()
    assert [transfers.save(page, KEYS[page]) for page in range(4)] == [True, True, True, False]
    assert tier.arrived.acquire(timeout=30)  # the first save is at the gate
    assert transfers.fetch(9, KEYS[8])
    assert transfers.finished() == [] and not transfers.wait(0.01)
    assert transfers.pending_saves == 3
    assert time.monotonic() - began < 5
    tier.gate.set()
    events = collect(transfers, 4)
    assert [(event.kind, event.page) for event in events] == [("save", 0), ("fetch", 9), ("save", 1), ("save", 2)]
    assert backend.export_page(9)[0] == 88
    transfers.close()


def test_closing_takes_no_longer_than_it_may(backend: Backend) -> None:
    tier = GatedTier()
    tier.pages[KEYS[8]] = np.zeros(backend.page_bytes, np.uint8)
    transfers = Transfers(backend, [tier])
    for page in range(4):
        assert transfers.save(page, KEYS[page])
    job = transfers.run(lambda: "never")
    for _ in range(2):
        assert tier.arrived.acquire(timeout=30)  # both threads are stuck
    assert transfers.fetch(9, KEYS[8])
    began = time.monotonic()
    transfers.close(timeout=0.2)
    assert 0.1 < time.monotonic() - began < 5
    assert job.cancelled()
    assert not transfers.save(5, KEYS[5]) and not transfers.fetch(5, KEYS[8])
    assert transfers.run(lambda: "too late").cancelled()
    backend.close()
    tier.gate.set()  # a thread that was stuck goes on, to no harm
    for thread in transfers._threads:
        thread.join(30)
        assert not thread.is_alive()
    assert (len(tier.pages), transfers.failures) == (3, 0), "what had not been begun was dropped"


def test_jobs_and_saved_states(backend: Backend, tmp_path: Path) -> None:
    numbered(backend)
    disk = DiskTier(tmp_path / "tier", 10**9, backend.page_bytes)
    transfers = Transfers(backend, [disk])

    tokens = array("i", range(2 * backend.page_size))
    saved, loaded = (Prefix(root_key("", "", "", origin), tokens, backend.page_size) for origin in ("", "kv-1"))

    def export() -> str:
        pages = ((saved.key(i), backend.export_page(page)) for i, page in enumerate((3, 4)))
        save_state(
            tmp_path / "state",
            tokens=saved.tokens,
            fingerprint="",
            metadata={"root": saved.parent(0).hex()},
            page_bytes=backend.page_bytes,
            pages=pages,
        )
        return "done"

    assert transfers.run(export).result(30) == "done"
    with pytest.raises(ZeroDivisionError):
        transfers.run(lambda: 1 // 0).result(30)
    state = StateFile(tmp_path / "state", "kv-1", backend.page_size, backend.page_bytes)
    transfers.add_tier(state)
    assert transfers.tier_of(loaded.key(1)) is state and transfers.tier_of(saved.key(1)) is None
    assert transfers.fetch(8, loaded.key(1))
    collect(transfers, 1)
    assert backend.export_page(8)[0] == 4
    assert transfers.save(8, loaded.key(1)), "a state is no tier to save to"
    collect(transfers, 1)
    assert loaded.key(1) in disk
    transfers.remove_tier(state)
    assert transfers.tier_of(loaded.key(0)) is None
    transfers.close()
    transfers.close()


def test_what_should_never_happen_is_a_failure_and_no_end(backend: Backend) -> None:
    """A tier of pages that do not fit, and a page that is not there."""
    host = HostTier(10**6)
    host.write(KEYS[0], np.zeros(backend.page_bytes + 1, np.uint8))
    transfers = Transfers(backend, [host])
    assert transfers.fetch(0, KEYS[0]) and transfers.save(PAGES, KEYS[1])
    assert {event.ok for event in collect(transfers, 2)} == {False}
    assert transfers.save(0, KEYS[1])
    assert collect(transfers, 1)[0].ok
    transfers.close()


def test_the_time_a_page_takes_is_measured(backend: Backend) -> None:
    class SlowTier(GatedTier):
        def _pass(self) -> None:
            time.sleep(0.02)

    tier = SlowTier()
    tier.pages[KEYS[0]] = np.zeros(backend.page_bytes, np.uint8)
    measured = []
    for threads in (1, 4):
        transfers = Transfers(backend, [tier], threads=threads)
        for page in range(PAGES):
            assert transfers.fetch(page, KEYS[0])
        collect(transfers, PAGES)
        measured.append(transfers.seconds_per_page)
        transfers.close()
    assert 0.019 < measured[0] < 0.2
    assert 0.004 < measured[1] < measured[0], "threads that wait side by side wait less for a page"


def test_a_page_that_comes_to_have_the_same_content_again_is_saved_once(backend: Backend) -> None:
    """It was evicted before its first save began, and computed again in the same place."""
    tier = GatedTier()
    transfers = Transfers(backend, [tier])
    cache = KVCache(16, 4, transfers=transfers)
    prefix = Prefix(root_key("model", "", ""), array("i", range(5)), 4)

    def compute() -> None:
        table, num_cached = cache.allocate(prefix) or pytest.fail("no room")
        assert num_cached == 0
        cache.release(table, 4)

    for _ in range(2):
        compute()
        cache.pool.evict_all()
    compute()
    cache.collect()
    assert (transfers.pending_saves, cache.is_moving) == (1, True)
    tier.gate.set()
    cache.flush(30)
    assert (cache.is_moving, transfers.pending_saves, cache.pool.num_available) == (False, 0, 16)
    transfers.close()

"""Two engines that share pages through a store that fails in every way: the tokens are right, and nobody waits long.

The model is arithmetic (prefix_backend.py) and takes no time, so a request takes as long as it waits for the store.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hostile_store import HostileStore
from octavo.kv.store import reading
from store_client import FULL, PAGE, PROMPT, STALL, StoreClient

KEY = "0f" * 32


@pytest.fixture
def clients() -> Iterator[Any]:
    """Make clients, and check them at the end."""
    made: list[StoreClient] = []

    def make(store: HostileStore, **settings: Any) -> StoreClient:
        made.append(StoreClient(store, **settings))
        return made[-1]

    yield make
    for client in made:
        client.store.gate.set()
        client.close()


def fill(clients: Any, pages: dict[str, bytes], **settings: Any) -> dict[str, bytes]:
    """Have an engine compute PROMPT, and write its pages."""
    client = clients(HostileStore(pages), **settings)
    assert client.ask() == 0
    client.settle()
    assert len(pages) == 10
    return pages


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("key", [None, KEY])
def test_what_one_engine_computes_another_one_finds(clients: Any, key: str | None) -> None:
    pages: dict[str, bytes] = {}
    first, second = (clients(HostileStore(pages), key=key) for _ in range(2))
    assert first.ask() == 0
    first.settle()
    assert len(pages) == 10
    assert second.ask() == FULL
    second.settle()
    assert not [call for call in second.store.calls if call[0] == "set"], "pages that are there are not written again"
    counts = second.engine.stats().tiers["store"]
    assert (counts.hits, counts.misses, counts.errors) == (10, 0, 0)
    content = b"".join(pages.values())
    assert (first.engine.backend.export_page(0).tobytes() in content) == (key is None)


def test_nothing_is_found_by_others(clients: Any) -> None:
    pages = fill(clients, {}, key=KEY)
    owner = clients(HostileStore(pages))
    owner.ask(tenant="a", salt="s")
    owner.settle()
    assert len(pages) == 20
    other = clients(HostileStore(pages))
    assert [other.ask(tenant="b", salt="s"), other.ask(tenant="a"), other.ask(salt="s"), other.ask()] == [0] * 4
    assert clients(HostileStore(pages), fingerprint="another model").ask(tenant="a", salt="s") == 0
    assert clients(HostileStore(pages), key="1e" * 32).ask() == 0


@pytest.mark.parametrize("method", ["has", "get", "set", "renew"])
@pytest.mark.parametrize("fault", ["wait", "fail"])
def test_a_store_that_hangs_or_raises(clients: Any, method: str, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    store = HostileStore()
    fill(clients, store.pages)
    client = clients(store)
    store.faults[method] = getattr(store, fault)
    for k in range(12):
        client.ask(PROMPT[k:] if k % 2 else PROMPT[:-k] if k else PROMPT)
    assert [call for call in store.calls if call[0] == method]
    assert client.longest < STALL
    assert len(warnings(caplog)) <= 1


def test_a_store_whose_read_hung_once_is_used_again(
    clients: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks in the meantime, so that only a probe can find out that it is back."""
    monkeypatch.setattr(reading, "_STUCK", 0.2)
    store = HostileStore(fill(clients, {}))
    client = clients(store)
    store.faults["get"] = store.wait
    deadline = time.monotonic() + 10
    while not warnings(caplog) and time.monotonic() < deadline:
        client.ask()
    assert not client.sharing.is_available
    store.faults.clear()
    store.gate.set()
    while not client.sharing.is_available and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [line.split(": ", 1)[1] for line in warnings(caplog)] == [
        "a hostile store cannot be used (it has not answered for 0.2 s); pages are computed until it can",
        "a hostile store can be used again",
    ]


def test_only_the_pages_that_the_store_has_evicted_are_written_again(clients: Any) -> None:
    pages = fill(clients, {})
    first = next(iter(pages))
    del pages[first]
    client = clients(HostileStore(pages))
    assert client.ask() == 0
    client.settle()
    assert [call for call in client.store.calls if call[0] == "set"] == [("set", first)]


def test_it_is_used_again_when_it_is_back(clients: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = HostileStore()
    for name in ("has", "get", "set", "renew"):
        store.faults[name] = store.fail
    client = clients(store)
    deadline = time.monotonic() + 10
    while not warnings(caplog) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert client.ask() == 0
    store.faults.clear()
    while not client.sharing.is_available and time.monotonic() < deadline:
        time.sleep(0.02)
    client.settle()
    assert len(store.pages) == 10, "what was computed in the meantime is written now"
    assert [line.split(": ", 1)[1] for line in warnings(caplog)] == [
        "a hostile store cannot be used (Connection refused); pages are computed until it can",
        "a hostile store can be used again",
    ]


@pytest.mark.parametrize(
    "garbage",
    [
        lambda name, value: value and bytes([value[0] ^ 1]) + value[1:],
        lambda name, value: value and value[:-1] + bytes([value[-1] ^ 128]),
        lambda name, value: value and value[:-8],
        lambda name, value: value and value + value,
        lambda name, value: b"",
        lambda name, value: "text",
        lambda name, value: 7,
        lambda name, value: None,
    ],
)
@pytest.mark.parametrize("key", [None, KEY])
def test_values_that_nobody_stored(clients: Any, garbage: Any, key: str | None) -> None:
    pages = fill(clients, {}, key=key)
    store = HostileStore(pages)
    client = clients(store, key=key)
    client.settle()
    store.faults["get"] = garbage
    assert client.ask() == 0
    client.settle()
    assert client.longest < STALL


def test_values_in_the_place_of_others(clients: Any) -> None:
    pages = fill(clients, {})
    names, values = list(pages), list(pages.values())
    pages.update(zip(names, values[1:] + values[:1], strict=True))
    assert clients(HostileStore(pages)).ask() == 0


@pytest.mark.parametrize("answer", [[], [True], [True] * 10_000, None, 7, "text", [None] * 5])
def test_answers_to_other_questions(clients: Any, answer: Any) -> None:
    store = HostileStore()
    store.faults |= {"has": lambda names, _: answer, "renew": lambda names, _: answer}
    client = clients(store)
    assert [client.ask(PROMPT[k:]) for k in range(3)] == [0] * 3
    assert client.longest < STALL


def test_damaged_pages_are_replaced(clients: Any) -> None:
    pages = fill(clients, {})
    for name, value in pages.items():
        pages[name] = value[:-1] + bytes([value[-1] ^ 1])
    damaged = clients(HostileStore(pages))
    assert damaged.ask() == 0
    damaged.settle()
    found = clients(HostileStore(pages)).ask()
    assert found >= PAGE, "the page that was found damaged is there again"
    assert damaged.engine.stats().tiers["store"].errors == 1


def test_a_full_store_is_still_read(clients: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = HostileStore()
    fill(clients, store.pages)
    client = clients(store)
    store.faults["set"] = store.refuse
    assert [client.ask(PROMPT[k + 1 :]) for k in range(5)] == [0] * 5
    client.settle()
    assert client.ask() == FULL
    assert [line for line in warnings(caplog) if "takes no pages" in line] == warnings(caplog)[:1]
    assert len(warnings(caplog)) == 1
    assert client.longest < STALL


@pytest.mark.parametrize("method", ["has", "get"])
def test_what_comes_late_is_used_for_the_rest_of_the_prompt(clients: Any, method: str) -> None:
    store = HostileStore(fill(clients, {}))
    client = clients(store, slowness=0.04)  # and two pages in each step
    delays = iter([0.13])
    store.faults[method] = lambda _, answer: time.sleep(next(delays, 0.0)) or answer
    assert 0 < client.ask() < FULL
    assert client.ask([*PROMPT, 0]) >= FULL, "and all pages are in the pool"


def test_a_store_slower_than_computing_is_given_up(clients: Any) -> None:
    pages = fill(clients, {})
    store = HostileStore(pages)
    client = clients(store)
    client.engine.scheduler.recovery.seconds_per_token = 0.001  # a page in 4 ms
    store.faults["get"] = lambda _, value: time.sleep(0.02) or value
    assert client.ask() < FULL
    assert client.longest < STALL
    store.calls.clear()
    client.ask([*PROMPT[1:], 0])
    assert not [call for call in store.calls if call[0] == "get"], "its speed is known now"

"""Engines that fetch pages from each other: the tokens are right whoever the other one is, and nobody waits long.

The model is arithmetic (prefix_backend.py), the sockets are real. Where pages are counted, requests wait longer than
usual, so that a busy machine makes no difference.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import zmq

from hostile_store import HostileStore
from octavo.curve import ZAP, Curve, admission
from octavo.engine.messages import PageSource
from octavo.kv.peers.access import PeerAccess
from octavo.kv.peers.fetching import PATIENCE, Peers
from octavo.kv.prefix import KEY_BYTES, page_keys, root_key
from octavo.kv.store.page_values import PageValues
from prefix_backend import after
from store_client import FULL, PAGE, PROMPT, STALL, StoreClient

ACCESS = PeerAccess("127.0.0.1", secrets.token_bytes(32))
KEYS = list(page_keys(root_key("model", "", ""), PROMPT, PAGE))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.kv.store.reading.PATIENCE", 5.0)


@pytest.fixture
def clients() -> Iterator[Any]:
    """Make clients, and check them at the end."""
    made: list[StoreClient] = []

    def make(store: HostileStore | None = None, access: PeerAccess = ACCESS, **settings: Any) -> StoreClient:
        made.append(StoreClient(store, access=access, **settings))
        return made[-1]

    yield make
    for client in made:
        client.close()


def pages_of(client: StoreClient, pages: int = 10) -> PageSource:
    return PageSource(f"tcp://127.0.0.1:{client.sharing.serve(client.engine.kv.pool)}", pages)


def from_peers(client: StoreClient) -> tuple[int, int, int]:
    """Pages that came from other engines, that were not there, and that were damaged."""
    counts = client.engine.stats().tiers["peers"]
    return counts.hits, counts.misses, counts.errors


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("key", [None, "0f" * 32])
def test_pages_come_from_the_engine_that_has_them(clients: Any, key: str | None) -> None:
    first, second = clients(key=key), clients(key=key)
    first.ask()
    assert second.ask(source=pages_of(first)) == FULL
    assert from_peers(second) == (10, 0, 0)
    assert first.engine.stats().tiers["peers"].bytes_written == 10 * first.engine.backend.page_bytes
    assert second.ask(source=pages_of(first)) == FULL and from_peers(second)[0] == 10, "they are in the pool"


@pytest.mark.usefixtures("patient")
def test_nothing_is_found_by_others(clients: Any) -> None:
    owner = clients()
    owner.ask(tenant="a", salt="s")
    source = pages_of(owner)
    other = clients()
    asked = [{"tenant": "b", "salt": "s"}, {"tenant": "a"}, {"salt": "s"}, {}]
    assert [other.ask(source=source, **terms) for terms in asked] == [0] * 4
    assert clients(fingerprint="another model").ask(tenant="a", salt="s", source=source) == 0
    other_key = clients(key="1e" * 32)
    assert other_key.ask(tenant="a", salt="s", source=source) == 0 and from_peers(other_key) == (0, 0, 1)
    assert clients().ask(tenant="a", salt="s", source=source) == FULL


@pytest.mark.usefixtures("patient")
def test_only_engines_with_the_secret_get_pages(clients: Any) -> None:
    owner = clients()
    owner.ask()
    address = pages_of(owner).address
    assert clients(access=PeerAccess("127.0.0.1", secrets.token_bytes(32))).ask(source=pages_of(owner)) == 0

    def as_frontend(socket: Any) -> None:
        Curve.of(ACCESS.secret).connect(socket)

    def knows_the_engines_key_only(socket: Any) -> None:
        socket.curve_serverkey = Curve.of(ACCESS.secret).engine[0]
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()

    def as_engine(socket: Any) -> None:
        Curve.of(ACCESS.secret).connect_as_engine(socket)

    answers = []
    with zmq.Context() as context:
        for prove in (as_engine, as_frontend, knows_the_engines_key_only, lambda socket: None):
            with context.socket(zmq.DEALER) as socket:
                socket.linger = 0
                prove(socket)
                socket.connect(address)
                socket.send_multipart((bytes(8), KEYS[0]))
                answers.append(socket.poll(5000 if prove is as_engine else 300))
    assert answers == [zmq.POLLIN, 0, 0, 0]


@pytest.mark.usefixtures("patient")
def test_a_page_that_is_evicted_while_it_is_read_is_not_sent(clients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied without a reference: another sequence may get the page meanwhile."""
    owner, asking = clients(num_pages=12), clients()
    owner.ask()
    backend, pool = owner.engine.backend, owner.engine.kv.pool
    read, evicted = backend.export_page, pool.find(KEYS[3])

    def export_page(page: int) -> np.ndarray:
        content = read(page).copy()
        if page == evicted:
            pool.evict(page)
            taken = [pool.allocate() for _ in range(pool.num_available)]
            content[: content.size // 2] = 0  # what the other sequence has written by now
            assert pool.publish(page, KEYS[3]), "even if it has the same content again"
            for each in reversed(taken):
                pool.release(each)
        return content

    monkeypatch.setattr(backend, "export_page", export_page)
    assert asking.ask(source=pages_of(owner)) == 3 * PAGE
    assert from_peers(asking)[::2] == (3, 0), "a page that changes is missing, not damaged"


def value(page: int) -> bytes:
    """What an engine sends of a page of PROMPT."""
    states, state = [], 0
    for token in PROMPT:
        states.append(state := after(state, token))
    content = np.array(states[page * PAGE : (page + 1) * PAGE], np.int64).view(np.uint8)
    return bytes(PageValues("model", PAGE * 8).seal(KEYS[page], content))


class FakeEngine:
    """Has the secret and gives what answers `answer`, a list of messages for each question; None: it closes.

    Args:
        answer: called with the number of the question and how many pages it asks for.
    """

    def __init__(self, answer: Callable[[bytes, int], Sequence[tuple[bytes, ...] | None]]):
        self._answer, self._context = answer, zmq.Context()
        self._gate, self._socket = self._context.socket(zmq.REP), self._context.socket(zmq.ROUTER)
        self._gate.bind(ZAP)
        Curve.of(ACCESS.secret).serve(self._socket)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ends.is_set():
            if self._gate.poll(1):
                own = Curve.of(ACCESS.secret).engine[0]
                self._gate.send_multipart(admission(self._gate.recv_multipart(), own))
            if self._socket.poll(1):
                asker, number, keys = self._socket.recv_multipart()
                for frames in self._answer(number, len(keys) // KEY_BYTES):
                    if frames is None:
                        self._socket.close(linger=1000)
                        self._context.destroy()
                        return
                    self._socket.send_multipart((asker, *frames))
        self._context.destroy(linger=0)

    def close(self) -> None:
        self._ends.set()
        self._thread.join()


# What an engine answers, and how many pages are used of it. What it has sent before it closes may be lost.
ANSWERS: dict[str, tuple[Callable[[bytes, int], Sequence[tuple[bytes, ...] | None]], Sequence[int]]] = {
    "all": (lambda number, count: [(number, value(page)) for page in range(count)], [10]),
    "none": (lambda number, count: [(number, b"")], [0]),
    "silence": (lambda number, count: [], [0]),
    "silence in the middle": (lambda number, count: [(number, value(page)) for page in range(4)], [4]),
    "the end in the middle": (lambda number, count: [*[(number, value(page)) for page in range(4)], None], range(5)),
    "another page": (lambda number, count: [(number, value(page)) for page in (0, 2, 1)], [1]),
    "garbage": (lambda number, count: [(number, value(0)), (number, secrets.token_bytes(48))], [1]),
    "a part": (lambda number, count: [(number, value(0)), (number, value(1)[:-1])], [1]),
    "answers to other questions": (
        lambda number, count: [
            (bytes(8), b"x"),
            (number,),
            (b"",),
            (number, b"", b""),
            *[(number, value(page)) for page in range(count)],
        ],
        [10],
    ),
    "more than was asked for": (lambda number, count: [(number, value(page % 10)) for page in range(count + 20)], [10]),
    "what is too long": (lambda number, count: [(number, bytes(100_000))], [0]),
}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("fault", ANSWERS)
def test_an_engine_that_answers_anything(clients: Any, fault: str) -> None:
    answer, pages = ANSWERS[fault]
    fake, client = FakeEngine(answer), clients()
    try:
        assert client.ask(source=PageSource(fake.address, 10)) // PAGE in pages
        assert client.ask() == FULL
    finally:
        fake.close()


@pytest.mark.parametrize("fault", ["silence", "silence in the middle", "what is too long"])
def test_nobody_waits_long(clients: Any, fault: str) -> None:
    fake, client = FakeEngine(ANSWERS[fault][0]), clients()
    try:
        client.ask(source=PageSource(fake.address, 10))
        assert client.longest < STALL
    finally:
        fake.close()


@pytest.mark.parametrize("address", ["", "tcp://127.0.0.1:1", "tcp://nowhere.invalid:7000", "ipc:///tmp/x", "x" * 9999])
def test_addresses_of_nobody(clients: Any, address: str) -> None:
    client = clients()
    assert client.ask(source=PageSource(address, 10_000_000)) == 0
    assert client.longest < STALL


def test_an_engine_that_is_lost_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.kv.peers.fetching.PATIENCE", 0.05)
    monkeypatch.setattr("octavo.kv.peers.fetching.PAUSE", 0.2)
    peers = Peers(ACCESS, 1000)
    for address in ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2"):
        peers.expect(address, [address[-1:].encode()])
    assert list(peers.fetch("tcp://127.0.0.1:1", [b"1"])) == []
    peers.expect("tcp://127.0.0.1:1", [b"1"])
    assert peers.holder(b"1") is None and peers.holder(b"2") == "tcp://127.0.0.1:2"
    deadline = time.monotonic() + 10
    while peers.holder(b"1") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert peers.holder(b"1") == "tcp://127.0.0.1:1"
    peers.disconnect()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("has", "store", "peers"), [(10, 0, 10), (5, 5, 5), (0, 10, 0)])
def test_other_engines_are_asked_before_the_store(clients: Any, has: int, store: int, peers: int) -> None:
    pages: dict[str, bytes] = {}
    owner = clients(HostileStore(pages))
    owner.ask()
    owner.settle()
    client = clients(HostileStore(pages))
    assert client.ask(source=pages_of(owner, has)) == FULL
    client.settle()
    counts = client.engine.stats().tiers
    assert (counts["store"].hits, counts["peers"].hits) == (store, peers)
    questions = [call for call in client.store.calls if call[0] == "has" and len(call[1]) > 1]
    assert len(questions) == (store > 0), "the store is not asked for what an engine has"


@pytest.mark.usefixtures("patient")
def test_the_store_has_what_a_lost_engine_does_not_send(clients: Any) -> None:
    pages: dict[str, bytes] = {}
    owner = clients(HostileStore(pages))
    owner.ask()
    owner.settle()
    fake = FakeEngine(ANSWERS["none"][0])
    try:
        client = clients(HostileStore(pages))
        assert client.ask(source=PageSource(fake.address, 10)) == FULL
        counts = client.engine.stats().tiers
        assert (counts["store"].hits, counts["peers"].hits) == (10, 0)
    finally:
        fake.close()


@pytest.mark.usefixtures("patient")
def test_a_store_that_is_down_does_not_keep_engines_apart(clients: Any) -> None:
    store = HostileStore()
    owner, client = clients(), clients(store)
    owner.ask()
    store.faults = dict.fromkeys(("has", "renew"), store.fail)
    client.ask([1] * 20)
    assert not client.sharing.is_available
    assert client.ask(source=pages_of(owner)) == FULL


def test_patience() -> None:
    assert PATIENCE < 1.0, "the thread that reads must not look as if the store hung"

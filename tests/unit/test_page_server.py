"""PageServer: what engines that have the secret can ask of it, and make it hold. Pages are as large as real ones."""

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import zmq

from octavo.curve import Curve
from octavo.kv.page_pool import PagePool
from octavo.kv.peers import MAX_KEYS
from octavo.kv.peers.access import PeerAccess
from octavo.kv.peers.fetching import Peers
from octavo.kv.peers.serving import PageServer
from octavo.kv.prefix import KEY_BYTES
from octavo.kv.store.page_values import MAX_OVERHEAD, PageValues
from octavo.kv.tiers.counts import TierCounts

ACCESS = PeerAccess("127.0.0.1", secrets.token_bytes(32))
SIZE = 2**18
KEY = b"k" * KEY_BYTES


class OnePage:
    """The part of a Backend that a server uses."""

    page_bytes = SIZE
    content = np.arange(SIZE).astype(np.uint8)

    def export_page(self, page: int) -> np.ndarray:
        return self.content


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of a server that has one page."""
    pool, backend = PagePool(1), OnePage()
    pool.publish(pool.allocate(), KEY)
    server = PageServer(ACCESS, pool, backend, PageValues("model", SIZE), TierCounts())  # type: ignore[arg-type]
    try:
        yield f"tcp://127.0.0.1:{server.port}"
    finally:
        server.close()


@contextlib.contextmanager
def engine(address: str) -> Iterator[Any]:
    """The connection of an engine, which takes in little that is not read."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as asking:
        asking.linger, asking.rcvhwm = 0, 1
        Curve.of(ACCESS.secret).connect_as_engine(asking)
        asking.connect(address)
        yield asking


def gets_page(asking: Any) -> bool:
    """Whether the answer to a question is the page."""
    asking.send_multipart((bytes(8), KEY))
    assert asking.poll(10_000)
    return bool(asking.recv_multipart()[1])


def fill(silent: Any, other: Any) -> None:
    """Ask for pages, and read none, until there have been none for others for a while."""
    last, deadline = time.monotonic(), time.monotonic() + 30
    while time.monotonic() < min(last + 0.3, deadline):
        with contextlib.suppress(zmq.Again):
            silent.send_multipart((bytes(8), KEY * MAX_KEYS), zmq.NOBLOCK)
        if gets_page(other):
            last = time.monotonic()
    assert time.monotonic() < deadline


def wait_for_page(asking: Any) -> None:
    deadline = time.monotonic() + 30
    while not gets_page(asking):
        assert time.monotonic() < deadline


def test_more_pages_than_a_question_may_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.kv.peers.fetching.PATIENCE", 10.0)
    peers, values = Peers(ACCESS, SIZE + MAX_OVERHEAD), PageValues("model", SIZE)
    with serving() as address:
        got = [values.open(KEY, value) for value in peers.fetch(address, [KEY] * (2 * MAX_KEYS + 1))]
    peers.disconnect()
    assert len(got) == 2 * MAX_KEYS + 1 and all(np.array_equal(each, OnePage.content) for each in got)


@pytest.mark.parametrize("stalled", [60_000, 1000])
def test_an_engine_that_does_not_read_is_given_no_more_than_a_limit(
    monkeypatch: pytest.MonkeyPatch, stalled: int
) -> None:
    """Others get pages again when it is gone, or cut off."""
    monkeypatch.setattr("octavo.kv.peers.serving.MAX_UNREAD", 8 * SIZE)
    monkeypatch.setattr("octavo.kv.peers.serving.STALLED", stalled)
    with serving() as address, engine(address) as other, contextlib.ExitStack() as stack:
        silent = stack.enter_context(engine(address))
        fill(silent, other)
        if stalled == 60_000:
            stack.close()
        wait_for_page(other)


@pytest.mark.parametrize(
    "question",
    [
        (bytes(7), KEY),
        (bytes(9), KEY),
        (b"", KEY),
        (KEY,),
        (bytes(8), KEY, KEY),
        (bytes(8), KEY[:-1]),
        (bytes(8), b""),
        (b"",) * 100,
    ],
    ids=lambda question: f"{len(question)} frames, {sum(map(len, question))} bytes",
)
def test_a_question_that_is_none_has_no_answer(question: Sequence[bytes], caplog: pytest.LogCaptureFixture) -> None:
    with serving() as address, engine(address) as asking:
        asking.send_multipart(question)
        asking.send_multipart((b"the next", KEY))
        assert asking.poll(10_000) and asking.recv_multipart()[0] == b"the next"
    assert not caplog.records


@pytest.mark.parametrize("question", [(bytes(8), KEY * (MAX_KEYS + 3)), (bytes(8), bytes(10**8)), (bytes(10**8),)])
def test_a_question_that_is_too_long_is_not_taken_in(question: Sequence[bytes]) -> None:
    with serving() as address, engine(address) as asking, engine(address) as other:
        closed = asking.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        asking.send_multipart(question)
        assert closed.poll(10_000)
        asking.disable_monitor()
        assert gets_page(other)


def test_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that prove nothing are closed after a while, and keep nobody waiting."""
    monkeypatch.setattr("octavo.kv.peers.serving.HANDSHAKE", 500)
    with serving() as address, contextlib.ExitStack() as stack:
        host, port = address.removeprefix("tcp://").split(":")
        strangers = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)]
        for other in [stack.enter_context(engine(address)) for _ in range(10)]:
            assert gets_page(other)
        for each in strangers:
            each.settimeout(10)
            while each.recv(4096):  # its greeting, then the end
                pass

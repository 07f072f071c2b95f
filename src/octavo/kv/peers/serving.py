"""PageServer: send pages of the pool to other engines, in a thread, beside the steps."""

import logging
import os
from collections.abc import Sequence
from threading import Lock, Thread
from typing import Any

import zmq

from octavo.backends.base import Backend
from octavo.curve import OVERHEAD, ZAP, Curve, admission
from octavo.kv.page_pool import PagePool
from octavo.kv.prefix import KEY_BYTES
from octavo.kv.store.page_values import PageValues
from octavo.kv.tiers.counts import TierCounts

from . import MAX_KEYS, NUMBER_BYTES
from .access import PeerAccess

MAX_QUEUED = 3 * MAX_KEYS  # pages that wait to be sent to one engine; one that reads too slowly gets no more of them
MAX_UNREAD = 2**29  # bytes of pages that wait to be sent to all engines; beyond it, pages are said to be missing
HANDSHAKE = 5_000  # milliseconds in which a connection must prove that it has the secret
STALLED = 5_000  # milliseconds after which an engine is cut off that takes nothing of what is sent to it

_log = logging.getLogger("octavo")


class PageServer:
    """Serves the published pages of a pool.

    A published page does not change until it is allocated again. So a page is copied without a reference to it, and is
    not sent if it was allocated in the meantime: the engine's thread neither waits nor is asked.

    Args:
        values: makes the values that are sent.
        counts: takes what is sent.

    Attributes:
        port: where it listens.

    Raises:
        OSError: It cannot listen.
    """

    def __init__(self, access: PeerAccess, pool: PagePool, backend: Backend, values: PageValues, counts: TierCounts):
        self._pool, self._backend, self._values, self._counts = pool, backend, values, counts
        self._unread: list[zmq.MessageTracker] = []  # of pages; all that wait to be sent are among them
        self._max_unread = max(1, MAX_UNREAD // backend.page_bytes)
        self._curve = Curve.of(access.secret)
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._gate: zmq.Socket[bytes] = self._context.socket(zmq.REP)
            self._gate.linger = 0
            self._gate.bind(ZAP)
            self._socket = self._listening(access.host)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(error.errno, zmq.strerror(error.errno or 0)) from None
        self.port = int(self._socket.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._ending, self._is_closing, self._lock = os.eventfd(0), False, Lock()
        self._thread = Thread(target=self._serve, name="octavo-peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving. No page is read any more when this returns. From any thread."""
        with self._lock:
            if not self._is_closing:
                self._is_closing = True
                os.eventfd_write(self._ending, 1)
        self._thread.join()

    def _listening(self, host: str) -> "zmq.Socket[bytes]":
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        socket.linger, socket.ipv6, socket.router_mandatory = 0, True, True
        socket.maxmsgsize, socket.sndhwm = KEY_BYTES * MAX_KEYS + OVERHEAD, MAX_QUEUED
        socket.handshake_ivl, socket.tcp_maxrt = HANDSHAKE, STALLED
        socket.copy_threshold = 0  # the memory of a page is taken as it is, and a tracker tells when it was sent
        self._curve.serve(socket)
        socket.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{'0.0.0.0' if host == '*' else host}:*")
        return socket

    def _serve(self) -> None:
        poller = zmq.Poller()
        for each in (self._gate, self._socket, self._ending):
            poller.register(each, zmq.POLLIN)
        while self._ending not in (ready := dict(poller.poll())):
            try:
                if self._gate in ready:
                    self._gate.send_multipart(admission(self._gate.recv_multipart(), self._curve.engine[0]))
                if self._socket in ready:
                    self._answer(self._socket.recv_multipart())
            except Exception:
                _log.exception("a page could not be sent to another engine")
        self._context.destroy(linger=0)
        os.close(self._ending)

    def _answer(self, frames: Sequence[bytes]) -> None:
        """Send the pages that a question asks for, as far as the engine that asks takes them."""
        if len(frames) != 3 or len(frames[1]) != NUMBER_BYTES or len(frames[2]) % KEY_BYTES:
            return
        asker, number, keys = frames
        for at in range(0, len(keys), KEY_BYTES):
            value = self._value(keys[at : at + KEY_BYTES]) if self._has_room() else None
            try:
                sent = self._socket.send_multipart((asker, number, value or b""), zmq.NOBLOCK, copy=False, track=True)
            except zmq.ZMQError:  # it is gone, or reads too slowly
                return
            if value is None:
                return
            assert sent is not None
            self._unread.append(sent)
            self._counts.bytes_written += self._backend.page_bytes

    def _has_room(self) -> bool:
        """Return whether another page may be copied: few enough wait to be sent."""
        if len(self._unread) >= self._max_unread:
            self._unread = [each for each in self._unread if not each.done]
        return len(self._unread) < self._max_unread

    def _value(self, key: bytes) -> memoryview | None:
        """Return the value of a page, in memory of its own; None if the pool does not have it, or not any more."""
        pool = self._pool
        if (page := pool.find(key)) is None:
            return None
        before = pool.times_allocated(page)
        if pool.find(key) != page:
            return None
        value = self._values.seal(key, self._backend.export_page(page))
        return value if pool.times_allocated(page) == before else None

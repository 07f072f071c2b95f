"""RemoteLink: an engine behind a TCP address, which others start and end."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from octavo.address import Address
from octavo.curve import Curve
from octavo.frontend.links.link import Exit
from octavo.frontend.links.messages import Failed, FromEngine, Submit, ToEngine, decode_from_engine, encode

from . import protocol
from .protocol import BEAT, NO_TERM, Beat, Ended, Goodbye, Hello, Malformed, Refused, Welcome
from .wire import Wire

PATIENCE = 3.0  # seconds until an engine must answer the hello
RETRY = 250  # milliseconds between attempts to connect until then
LINGER = 200  # milliseconds in which the goodbye may be sent

log = logging.getLogger("octavo")


def open_socket(context: "zmq.Context[Any]", curve: Curve | None) -> "zmq.Socket[bytes]":
    """Return a socket with which a frontend can connect to an engine."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.linger, socket.immediate, socket.ipv6 = 0, True, True
    socket.reconnect_ivl, socket.reconnect_ivl_max = RETRY, 4 * RETRY
    socket.maxmsgsize, socket.sndhwm, socket.rcvhwm = protocol.MAX_MESSAGE, protocol.MAX_QUEUED, protocol.MAX_QUEUED
    if curve is not None:
        curve.connect(socket)
    return socket


class Handshakes:
    """Tells from the events of a connection whether its handshake succeeds.

    A peer that does not know the key closes the connection without a word, and so does one that is being ended. So
    twice in a row counts as a refusal.
    """

    _REFUSALS = (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_AUTH)

    def __init__(self) -> None:
        self._closed = 0

    def is_done(self, event: int) -> bool:
        """Return whether an event tells of a success."""
        return event == zmq.Event.HANDSHAKE_SUCCEEDED

    def is_refused(self, event: int) -> bool:
        """Return whether an event tells that there will be no success."""
        self._closed += event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
        return event in self._REFUSALS or self._closed > 1


def refusal(address: Address, curve: Curve | None) -> str:
    """Return why a handshake has failed, as far as this side can know."""
    secret = "has another secret" if curve is not None else "wants a secret"
    return f"{address} refuses the connection: it {secret} (--secret-file), or it is no engine of Octavo"


class RemoteLink:
    """A Link to an engine that runs elsewhere: one session, see protocol.py. It cannot kill the engine, only leave it.

    Args:
        digest: of the model that the engine must serve.
        is_open: returns whether the frontend has no request on trial with this engine.
    """

    pid: int | None = None
    heartbeats = True
    is_remote = True

    def __init__(
        self,
        context: "zmq.Context[Any]",
        address: Address,
        curve: Curve | None,
        digest: str,
        is_open: Callable[[], bool],
    ):
        self._context, self._address, self._curve, self._digest = context, address, curve, digest
        self._is_open, self.host = is_open, address.host
        self._wire: Wire | None = None
        self._monitor: Wire | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._term = NO_TERM
        self._handshakes = Handshakes()
        self._said_hello = False
        self._exit = Exit("this frontend has left it", is_fault=False)

    async def connect(self, on_message: Callable[[FromEngine], None], on_end: Callable[[], None]) -> None:
        self._on_message, self._on_end = on_message, on_end
        socket = open_socket(self._context, self._curve)
        self._monitor = Wire(socket.get_monitor_socket(), self._notice)
        self._wire = Wire(socket, self._receive)
        socket.connect(str(self._address))
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._give_up)

    def send(self, message: ToEngine) -> None:
        payload = encode(message)
        if len(payload) <= protocol.MAX_MESSAGE:
            self._send(self._term, payload)
        elif isinstance(message, Submit) and len(message.requests) > 1:
            for request in message.requests:
                self.send(Submit([request]))
        else:
            raise ValueError(f"it takes {len(payload) >> 20} MiB, and {protocol.MAX_MESSAGE >> 20} MiB is the limit")

    async def close(self) -> None:
        await self.kill()

    async def kill(self) -> Exit:
        if self._wire is not None:
            self._wire.socket.linger = LINGER
            self._wire.send((NO_TERM, encode(Goodbye())))
        self._disconnect()
        return self._exit

    def _disconnect(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._wire is not None and self._monitor is not None:
            self._wire.socket.disable_monitor()  # first: it would wait for a reader that is closed
            self._monitor.close()
            self._wire.close()
        self._wire = self._monitor = None

    def _send(self, term: bytes, payload: bytes) -> None:
        if self._wire is not None and not self._wire.send((term, payload)) and self._term != NO_TERM:
            self._end(Exit("the connection takes no more messages", is_fault=False))

    def _beat(self) -> None:
        self._send(NO_TERM, encode(Beat(self._is_open())))
        if self._wire is not None:
            self._timer = asyncio.get_running_loop().call_later(BEAT, self._beat)

    def _give_up(self) -> None:
        self._fail(f"{self._address} does not answer")

    def _fail(self, reason: str) -> None:
        """Report why there is no session."""
        if self._wire is not None:
            self._on_message(Failed("EngineDead", reason))
            self._end(Exit(reason, is_fault=False))

    def _end(self, exit: Exit) -> None:
        if self._wire is not None:
            self._exit = exit
            self._disconnect()
            self._on_end()

    def _notice(self, frames: list[bytes]) -> None:
        """Follow what happens to the connection."""
        event = parse_monitor_message(frames)["event"]
        if self._handshakes.is_done(event) and not self._said_hello:
            self._said_hello = True
            self._send(NO_TERM, encode(Hello(digest=self._digest)))
        elif self._handshakes.is_refused(event):
            self._fail(refusal(self._address, self._curve))
        elif event == zmq.Event.DISCONNECTED and self._said_hello:
            self._end(Exit("the connection was closed", is_fault=False))

    def _receive(self, frames: list[bytes]) -> None:
        try:
            term, payload = protocol.split(frames)
            if term == NO_TERM:
                self._take(protocol.from_host(payload))
            elif term == self._term:  # otherwise it belongs to a session that has ended
                self._on_message(_decoded(payload))
        except Malformed as error:
            self._fail(f"{self._address} sent a message that cannot be read: {error}")

    def _take(self, message: protocol.FromHost) -> None:
        match message:
            case Welcome() if self._wire is not None and self._term == NO_TERM:
                self._term = message.term
                if self._timer is not None:
                    self._timer.cancel()
                self._beat()
            case Refused():
                self._fail(f"{self._address}: {message.reason}")
            case Ended():
                self._end(message.exit())


def _decoded(payload: bytes) -> FromEngine:
    try:
        message: FromEngine = decode_from_engine(payload)
        return message
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None

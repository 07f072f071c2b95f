"""Discovery: get the model's small files from the first engine that answers."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from octavo.address import Address
from octavo.errors import ConfigError

from . import protocol
from .curve import Curve
from .link import HANDSHAKE_FAILED, open_socket
from .model_files import ModelFiles
from .protocol import NO_TERM, AskFiles, Files, Malformed, Refused, encode

ROUND = 1.0  # seconds to wait for each engine before the next one is asked too
FIRST_ROUND = 0.2
LOOK = 0.02  # seconds between looks at the sockets


@dataclass(frozen=True)
class FoundModel:
    """The model that engines serve, as one of them has described it.

    Attributes:
        name: in the API.
        batch: the engine's max_batch_size and max_batch_tokens.
    """

    name: str
    files: ModelFiles
    batch: dict[str, int]


def find_model(
    addresses: Sequence[Address],
    curve: Curve | None,
    report: Callable[[str], None] = lambda text: None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> FoundModel:
    """Wait until an engine describes its model. Blocks.

    Args:
        report: called with the reason for the wait, in one line, whenever it changes.
        is_wanted: returns whether to go on; otherwise TimeoutError is raised.

    Raises:
        ConfigError: Every engine has refused this frontend, such as for its secret or its version.
    """
    context: zmq.Context[Any] = zmq.Context()
    last = ""
    try:
        while True:
            reasons: list[str] = []
            refused = 0
            for address in addresses:
                answer = _ask(context, address, curve, is_wanted)
                if isinstance(answer, FoundModel):
                    return answer
                reasons.append(answer.reason)
                refused += answer.is_refusal
                if not is_wanted():
                    raise TimeoutError
            if refused == len(addresses):
                raise ConfigError("; ".join(reasons))
            if (text := "; ".join(reasons)) != last:
                report(text)
                last = text
    finally:
        context.destroy(linger=0)


@dataclass(frozen=True, slots=True)
class _NoAnswer:
    reason: str
    is_refusal: bool = False


def _ask(
    context: "zmq.Context[Any]", address: Address, curve: Curve | None, is_wanted: Callable[[], bool]
) -> FoundModel | _NoAnswer:
    """Ask the engines at an address for the model's files; return the first answer."""
    try:
        found = address.resolved()
    except OSError as error:
        _sleep(ROUND, is_wanted)
        return _NoAnswer(f"{address}: the host is unknown ({error.strerror or error})")
    refusal = None
    for number in found:
        socket = open_socket(context, curve)
        monitor = socket.get_monitor_socket()
        try:
            socket.connect(str(number))
            for event, frames in _events(socket, monitor, ROUND, is_wanted):
                if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                    socket.send_multipart((NO_TERM, encode(AskFiles())))
                elif event in HANDSHAKE_FAILED:
                    wants = "has another secret" if curve is not None else "wants a secret"
                    reason = f"it {wants} (--secret-file), or it is no engine of Octavo"
                    refusal = _NoAnswer(f"{address} refuses the connection: {reason}", True)
                    break
                elif frames is not None:
                    answer = _answer(address, frames)
                    if isinstance(answer, FoundModel):
                        return answer
                    refusal = answer
                    break
        finally:
            socket.disable_monitor()
            monitor.close()
            socket.close()
    return refusal or _NoAnswer(f"{address} does not answer")


def _answer(address: Address, frames: list[bytes]) -> FoundModel | _NoAnswer:
    try:
        _, payload = protocol.split(frames)
        message = protocol.from_host(payload)
    except Malformed:
        return _NoAnswer(f"{address} is no engine of Octavo, or of another version", True)
    match message:
        case Files():
            return FoundModel(message.name, ModelFiles(message.files), message.batch)
        case Refused():
            return _NoAnswer(f"{address}: {message.reason}", True)
        case _:
            return _NoAnswer(f"{address} gave another answer than was asked for", True)


def _events(
    socket: "zmq.Socket[bytes]", monitor: "zmq.Socket[bytes]", seconds: float, is_wanted: Callable[[], bool]
) -> Iterator[tuple[int | None, list[bytes] | None]]:
    """Yield what happens to a connection, and the messages that arrive, for so many seconds, and longer once it is up."""
    deadline = time.monotonic() + seconds
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(monitor, zmq.POLLIN)
    while time.monotonic() < deadline and is_wanted():
        ready = dict(poller.poll(100))
        if monitor in ready:
            event = parse_monitor_message(monitor.recv_multipart())["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                deadline += 60 * seconds  # the files may be large, and the line slow
            yield event, None
        if socket in ready:
            yield None, socket.recv_multipart()


def _sleep(seconds: float, is_wanted: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and is_wanted():
        time.sleep(LOOK)

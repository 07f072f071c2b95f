"""Discovery: get the model's small files from the first engine that answers."""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from octavo.address import Address
from octavo.curve import Curve
from octavo.errors import ConfigError

from . import protocol
from .link import Handshakes, open_socket, refusal
from .model_files import ModelFiles
from .protocol import NO_TERM, AskFiles, Files, Malformed, Refused, encode

PATIENCE = 1.0  # seconds for an engine to accept a connection
FILES_PATIENCE = 60.0  # seconds for its files to arrive then: they may be large, and the line slow
NAMED = 3  # engines whose answers are reported
LOOK = 20  # milliseconds between looks whether the answer is still wanted


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


@dataclass(frozen=True, slots=True)
class _NoAnswer:
    """Why an address gave no description, and whether it has refused to."""

    reason: str
    is_refusal: bool = False


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
            answer = _first(_ask_all(context, address, curve, is_wanted) for address in addresses)
            if isinstance(answer, FoundModel):
                return answer
            if not is_wanted():
                raise TimeoutError
            if answer.is_refusal:
                raise ConfigError(answer.reason)
            if answer.reason != last:
                report(answer.reason)
                last = answer.reason
    finally:
        context.destroy(linger=0)


def _ask_all(
    context: "zmq.Context[Any]", address: Address, curve: Curve | None, is_wanted: Callable[[], bool]
) -> FoundModel | _NoAnswer:
    """Ask the engines behind an address for the model's files, one after the other."""
    try:
        engines = address.resolved()
    except OSError as error:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and is_wanted():
            time.sleep(LOOK / 1000)
        return _NoAnswer(f"{address}: the host is unknown ({error.strerror or error})")
    return _first(_ask(context, engine, curve, is_wanted) for engine in engines)


def _first(answers: Iterable[FoundModel | _NoAnswer]) -> FoundModel | _NoAnswer:
    """Return the first description. Without one, sum up why: it is a refusal if all have refused."""
    failures: list[_NoAnswer] = []
    for answer in answers:
        if isinstance(answer, FoundModel):
            return answer
        failures.append(answer)
    reasons = "; ".join(dict.fromkeys(failure.reason for failure in failures[:NAMED]))
    return _NoAnswer(reasons, is_refusal=all(failure.is_refusal for failure in failures))


def _ask(
    context: "zmq.Context[Any]", engine: Address, curve: Curve | None, is_wanted: Callable[[], bool]
) -> FoundModel | _NoAnswer:
    """Ask one engine for the model's files."""
    socket = open_socket(context, curve)
    socket.sndtimeo = LOOK
    monitor = socket.get_monitor_socket()
    poller = zmq.Poller()
    for each in (socket, monitor):
        poller.register(each, zmq.POLLIN)
    deadline, handshakes, is_connected = time.monotonic() + PATIENCE, Handshakes(), False
    try:
        socket.connect(str(engine))
        while time.monotonic() < deadline and is_wanted():
            ready = dict(poller.poll(LOOK))
            if monitor in ready:
                event = parse_monitor_message(monitor.recv_multipart())["event"]
                if handshakes.is_refused(event):
                    return _NoAnswer(refusal(engine, curve), is_refusal=True)
                if handshakes.is_done(event):
                    with contextlib.suppress(zmq.Again):
                        socket.send_multipart((NO_TERM, encode(AskFiles())))
                    deadline, is_connected = time.monotonic() + FILES_PATIENCE, True
                elif event == zmq.Event.DISCONNECTED and is_connected:
                    return _NoAnswer(f"{engine} has closed the connection")
            if socket in ready:
                return _answer(engine, socket.recv_multipart())
        return _NoAnswer(f"{engine} does not answer")
    finally:
        socket.disable_monitor()
        monitor.close()
        socket.close()


def _answer(engine: Address, frames: list[bytes]) -> FoundModel | _NoAnswer:
    try:
        message = protocol.from_host(protocol.split(frames)[1])
    except Malformed:
        return _NoAnswer(f"{engine} is no engine of Octavo, or of another version", is_refusal=True)
    if isinstance(message, Files):
        return FoundModel(message.name, ModelFiles(message.files), message.batch)
    reason = message.reason if isinstance(message, Refused) else "it gave another answer than was asked for"
    return _NoAnswer(f"{engine}: {reason}", is_refusal=True)

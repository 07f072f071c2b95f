"""The process of `octavo engine`: one engine, which frontends use over the network."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import typer
import uvloop
import zmq
from zmq.utils.monitor import parse_monitor_message

from octavo.address import Address
from octavo.config import EngineConfig
from octavo.curve import Curve
from octavo.daemon_thread import in_daemon_thread
from octavo.engine.messages import EngineInfo
from octavo.errors import ConfigError
from octavo.formats.files import unlock
from octavo.frontend.links.process import EngineProcess, ProcessLink
from octavo.frontend.request_trace import RequestTrace
from octavo.kv.peers.access import PeerAccess
from octavo.process_guard import hide_memory
from octavo.secret import Secrets
from octavo.terminal import printable
from octavo.version import __version__
from octavo.weights import resolve

from .doorkeeper import Doorkeeper
from .host import EngineHost
from .model_files import ModelFiles
from .protocol import MAX_MESSAGE, MAX_QUEUED, Files
from .wire import Wire

DRAIN = 60.0  # seconds that requests may take to finish after SIGTERM or Ctrl-C, where there is no other engine
LOOK = 0.05  # seconds between looks whether they have
LINGER = 500  # milliseconds to send what is queued at the end
HANDSHAKE = 5_000  # milliseconds in which a connection must prove that it has the secret
QUIET = 10.0  # seconds between lines about strangers

_FAILED = (zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_AUTH)

log = logging.getLogger("octavo")


def run_engine(config: EngineConfig, listen: str) -> None:
    """Serve frontends until SIGTERM, SIGHUP or Ctrl-C, then let them move their requests elsewhere, and return.

    If such a signal comes while the model is found and loaded, this ends the process.

    Args:
        listen: address to listen on, such as tcp://0.0.0.0:7000.

    Raises ConfigError, and any error from loading the model.
    """
    address, curve = Address.of(listen), Curve.read(config.secret_file)
    if config.engines is not None:
        raise ConfigError("engines is for octavo serve; an engine of its own has none")
    if config.kv_events is not None or config.kv_events_replay is not None:
        raise ConfigError("kv_events is for octavo serve: the frontend publishes the pages of its engines")
    if config.data_parallel_size > 1:
        raise ConfigError("data_parallel_size must be 1 with octavo engine: start one octavo engine for each")
    try:
        address = address if address.is_any else address.resolved()[0]
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from None
    if curve is None and config.role != "both":
        raise ConfigError("role needs the shared secret, with which engines fetch pages: give --secret-file FILE")
    if curve is None and not address.is_local:
        raise ConfigError(f"{address} can be reached from other machines: give the shared secret, --secret-file FILE")
    if not uvloop.run(_run(config, address, curve)):
        os._exit(0)  # otherwise Python would wait for the threads of a download, which may hang


async def _run(config: EngineConfig, address: Address, curve: Curve | None) -> bool:
    """Listen, load and serve. The first signal while it serves begins to drain; any other one cancels.

    Returns whether it has served.
    """
    task = asyncio.current_task()
    assert task is not None
    stop = asyncio.Event()
    serving = asyncio.Event()

    def on_signal() -> None:
        if serving.is_set() and not stop.is_set():
            stop.set()
        else:
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal)
    with contextlib.suppress(asyncio.CancelledError):
        await serve_engine(config, address, curve, serving, stop)
    return serving.is_set()


async def serve_engine(
    config: EngineConfig, address: Address, curve: Curve | None, serving: asyncio.Event, stop: asyncio.Event
) -> None:
    """Listen, load the model, set `serving`, and serve frontends until `stop` is set; then drain.

    Raises ConfigError, and any error from loading the model.
    """
    context: zmq.Context[Any] = zmq.Context()
    process = None
    host = None
    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy)
        try:
            if curve is not None:
                hide_memory()
                stack.callback(Doorkeeper(context, curve).close)  # before anybody can connect
            socket = _listening(context, address, curve)
            process = EngineProcess()  # imports its modules while this process reads the files
            # In a thread that nothing waits for: a download may take long, or hang, and signals must end it.
            path, secrets, files = await in_daemon_thread(partial(_read_model, config))
            access = None if curve is None else PeerAccess(address.host, curve.secret)
            description = Files(
                config.model_name,
                dict(files.content),
                {"max_batch_size": config.max_batch_size, "max_batch_tokens": config.max_batch_tokens},
            )
            trace = None
            if config.trace is not None:
                trace = RequestTrace(config.trace, config.model_name)
                stack.callback(trace.close)
            wire: Wire | None = None
            host = EngineHost(
                partial(ProcessLink, config, path, None, 0, secrets, access),
                description,
                files.digest,
                lambda frames: wire is not None and wire.send(frames),
                trace.engine_times if trace is not None else None,
            )
            monitor = Wire(socket.get_monitor_socket(), _strangers())
            stack.callback(monitor.close)
            wire = Wire(socket, host.receive)
            stack.callback(wire.close)
            stack.callback(socket.disable_monitor)
            link = ProcessLink(config, path, process, 0, secrets, access)
            info = await host.start(link)
            _announce(config, address, curve, info)
            serving.set()
            await stop.wait()
            await _drain(host)
        finally:
            if host is not None:
                await host.close()
            elif process is not None:
                process.end()


def _read_model(config: EngineConfig) -> tuple[Path, Secrets, ModelFiles]:
    """Return the model's place, which is downloaded if need be, its secrets and its small files."""
    path, secrets = resolve(config.model, config.revision), config.read_secrets()
    return path, secrets, ModelFiles.read(unlock(path, secrets.model_identity))


async def _drain(host: EngineHost) -> None:
    """Wait until frontends have moved their requests elsewhere, or these have finished."""
    host.leave()
    begun = time.monotonic()
    while host.sessions and time.monotonic() - begun < DRAIN:
        await asyncio.sleep(LOOK)
    log.warning("the engine is drained: it has %d requests after %.2f s", host.num_requests, time.monotonic() - begun)


def _listening(context: "zmq.Context[Any]", address: Address, curve: Curve | None) -> "zmq.Socket[bytes]":
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    socket.linger, socket.ipv6, socket.router_mandatory = LINGER, True, True
    socket.maxmsgsize, socket.sndhwm, socket.rcvhwm = MAX_MESSAGE, MAX_QUEUED, MAX_QUEUED
    socket.handshake_ivl = HANDSHAKE
    if curve is not None:
        curve.serve(socket)
    try:
        socket.bind(str(address).replace("//*", "//0.0.0.0"))
    except zmq.ZMQError as error:
        socket.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {address.port} on {address.host} is in use: stop the program that uses it, or choose another one"
            ) from None
        raise ConfigError(f"cannot listen on {address}: {zmq.strerror(error.errno or 0)}") from None
    return socket


def _strangers() -> Callable[[list[bytes]], None]:
    """Return a function that logs failed handshakes, a line for all of some seconds."""
    last = float("-inf")

    def notice(frames: list[bytes]) -> None:
        nonlocal last
        if parse_monitor_message(frames)["event"] in _FAILED and time.monotonic() - last > QUIET:
            last = time.monotonic()
            log.warning("a connection was refused: it has another secret or none, or is no frontend of Octavo")

    return notice


def _announce(config: EngineConfig, address: Address, curve: Curve | None, info: EngineInfo) -> None:
    name = printable(config.model_name, lines=False)
    lines = [] if info.plan is None else [f"  {subject:<9} {words}" for subject, words in info.plan.lines().items()]
    secret = "" if curve is None else " --secret-file FILE"
    host = "THIS-HOST" if address.is_any else address.host
    text = "\n".join([f"\nOctavo {__version__}: an engine of {name} on {address}; Ctrl-C ends it.", *lines])
    with contextlib.suppress(OSError):
        typer.echo(f"{text}\nUse it by:\n\noctavo serve --engines {Address(host, address.port)}{secret}\n")

"""Run the server process: listen, start the engine, announce the address, serve, drain."""

import asyncio
import contextlib
import dataclasses
import errno
import gc
import json
import os
import resource
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, NoReturn

import typer
import uvloop

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.frontend.links.process import EngineProcess
from octavo.terminal import printable
from octavo.version import __version__

from .config import ServerConfig

if TYPE_CHECKING:
    from octavo.fleet.fleet import Fleet
    from octavo.fleet.model import Model
    from octavo.fleet.specs import FleetSpec

    from .edge.draining import DrainingServer

BACKLOG = 4096  # connections that may wait to be accepted; the kernel's somaxconn may allow fewer
MAX_FILES = 65_536  # open files, one for each connection
OTHER_FILES = 256  # open files that the process needs besides its connections
ALL_ADDRESSES = {"": ("::", "0.0.0.0"), "::": ("::", "0.0.0.0")}


def serve(engine: EngineConfig | Callable[[], "FleetSpec"], config: ServerConfig) -> None:
    """Serve until SIGTERM, SIGHUP or Ctrl-C, then let running requests finish and return.

    A second signal, or a signal while the model loads, ends the server at once.

    Args:
        engine: the settings of a single model; or a function that returns the description of several.

    Raises ConfigError if the server cannot listen on the address, and any error from loading the model.
    """
    gc.disable()  # until the server is ready: imports make no garbage, and the collector would scan them
    _open_standard_streams()
    with _exit_on_signals(), contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listener) for listener in listen(config.host, config.port)]
        connections = min(config.max_connections, _raise_file_limit() - OTHER_FILES)
        config = dataclasses.replace(config, max_connections=max(connections, 1))
        uvloop.run(_run(_begin_loading(engine), config, listeners))


def _begin_loading(engine: EngineConfig | Callable[[], "FleetSpec"]) -> "Fleet":
    process = EngineProcess()  # imports its modules while this process imports its own
    try:
        from octavo.fleet.fleet import Fleet
        from octavo.fleet.specs import FleetSpec, ModelSpec

        spec = FleetSpec([ModelSpec(config=engine)]) if isinstance(engine, EngineConfig) else engine()
    except BaseException:
        process.end()
        raise
    return Fleet.begin(spec, process)


async def _run(fleet: "Fleet", config: ServerConfig, listeners: list[socket.socket]) -> None:
    """Serve in a separate task. The first signal while it serves starts draining; any other signal cancels the task."""
    from .edge.draining import on_signals  # imported late: the engine process is already loading weights

    servers: list[DrainingServer] = []
    serving = asyncio.ensure_future(_serve(fleet, config, listeners, servers))

    def stop() -> None:
        if servers and not servers[0].should_exit:
            servers[0].stop()
        else:
            serving.cancel()

    with on_signals(stop), contextlib.suppress(asyncio.CancelledError):
        await serving


async def _serve(
    fleet: "Fleet", config: ServerConfig, listeners: list[socket.socket], servers: "list[DrainingServer]"
) -> None:
    """Load, then serve. The server is appended to `servers` when it starts."""
    from .app import create_app
    from .edge.access_log import AccessLog
    from .edge.draining import DrainingServer

    access_log = AccessLog(config.access_log, sys.stdout, config.access_log_prompts)
    try:
        await fleet.start()
        app = create_app(fleet, config, draining=lambda: servers[0].should_exit)
        server = DrainingServer(app, config, access_log, on_ready=lambda: _announce(fleet, config, listeners[0]))
        servers.append(server)
        gc.enable()
        gc.freeze()  # otherwise the collector scans all modules from time to time, which delays every stream
        await server.serve(listeners)
    finally:
        await fleet.close()
        access_log.close()


def listen(host: str, port: int) -> list[socket.socket]:
    """Return one listening socket for every address of `host`, all on the same port. Port 0 takes a free port.

    An empty host and :: stand for all addresses of IPv4 and IPv6; a family that the machine lacks is left out. Clients
    that connect before the engine is ready wait. Raises ConfigError if an address is unknown or taken.
    """
    addresses = _addresses(host, port)
    listeners: list[socket.socket] = []
    failure: OSError | None = None
    for family, address in addresses:
        bound = (address[0], listeners[0].getsockname()[1], *address[2:]) if listeners else address
        try:
            listeners.append(socket.create_server(bound, family=family, backlog=BACKLOG))
        except OSError as error:
            failure = error
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                break
    if listeners and (failure is None or failure.errno != errno.EADDRINUSE):
        return listeners
    for listener in listeners:
        listener.close()
    assert failure is not None
    if failure.errno == errno.EADDRINUSE:
        where = f"port {port} on {host or 'all addresses'}"
        raise ConfigError(f"{where} is in use: stop the program that uses it, or choose another --port") from None
    raise ConfigError(f"cannot listen on {host} port {port}: {failure.strerror or failure}") from None


def _addresses(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    """Return the address families and addresses of `host`, without duplicates."""
    found: dict[tuple[int, tuple[str, int]], None] = {}
    for name in ALL_ADDRESSES.get(host, (host,)):
        try:
            results = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
        found.update({(family, address): None for family, _, _, _, address in results})  # type: ignore[misc]
    return list(found)


def _raise_file_limit() -> int:
    """Raise this process's limit of open files as far as the machine allows, to MAX_FILES at most. Return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft


def _open_standard_streams() -> None:
    """Open /dev/null for each of standard input, output and error that is closed.

    Otherwise the next file or socket would get the number of a standard stream, and printed text would go to it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)  # for the engine's process
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


@contextlib.contextmanager
def _exit_on_signals() -> Generator[None, None, None]:
    """Raise SystemExit on SIGTERM and SIGHUP in this block. Without a handler, the kernel ignores them for PID 1."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    signals = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, leave) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _decisions(model: "Model") -> list[str]:
    """Return what the model's engines have decided when they loaded, a line each. Nothing if it is not loaded."""
    plan = model.llm.info.plan if model.was_loaded else None
    if plan is None:
        return []
    engines = f" ({model.config.data_parallel_size} engines, each with)" if model.config.data_parallel_size > 1 else ""
    lines = [f"  {subject:<9} {words}" for subject, words in plan.lines().items()]
    return [f"{printable(model.name, lines=False)}{engines}", *lines]


def _announce(fleet: "Fleet", config: ServerConfig, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # an address to connect to
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    model = fleet.default.name
    if fleet.default.was_loaded and fleet.default.llm.tokenizer.has_chat_template:
        route, body = "chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    else:
        route, body = "completions", {"model": model, "prompt": "Once upon a time"}
    headers = ["-H", "Content-Type: application/json"]
    if config.has_keys:
        headers += ["-H", "Authorization: Bearer KEY"]
    curl = shlex.join(["curl", f"{url}/v1/{route}", *headers, "-d", json.dumps(body)])
    try:
        names = ", ".join(each.name for each in fleet.models)
        decisions = "\n".join(line for model in fleet.models for line in _decisions(model))
        typer.echo(f"\nOctavo {__version__} serves {printable(names)} on {url}; Ctrl-C ends it.\n{decisions}")
        typer.echo(f"Try it{' in a browser, or' if config.page else ''}:\n\n{curl}\n")
    except OSError:  # stdout is a full disk or a closed pipe; its buffer must not be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

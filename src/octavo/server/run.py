"""Run the server process: listen, start the engine, announce the address, serve, drain."""

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import resource
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
import uvloop

from octavo.config import EngineConfig
from octavo.frontend.links.process import EngineProcess
from octavo.process_guard import hide_memory
from octavo.secret import read_key
from octavo.terminal import printable
from octavo.version import __version__

from .config import ServerConfig
from .listeners import listen, unix_listener

if TYPE_CHECKING:
    from octavo.fleet.fleet import Fleet
    from octavo.fleet.model import Model
    from octavo.fleet.specs import FleetSpec
    from octavo.tracing.spans import Spans

    from .audit import AuditLog
    from .edge.certificates import Certificates
    from .edge.dispatch import Dispatcher
    from .edge.draining import DrainingServer
    from .edge.http_spans import HttpSpans

MAX_FILES = 65_536  # open files, one for each connection
OTHER_FILES = 256  # open files that the process needs besides its connections


def serve(engine: EngineConfig | Callable[[], "FleetSpec"], config: ServerConfig) -> None:
    """Serve until SIGTERM, SIGHUP or Ctrl-C, then let running requests finish and return.

    A second signal, or a signal while the model loads, ends the server at once.

    Args:
        engine: the settings of a single model; or a function that returns the description of several.

    Raises ConfigError if the server cannot listen on the address or read its certificate, and any error from loading
    the model.
    """
    gc.disable()  # until the server is ready: imports make no garbage, and the collector would scan them
    _open_standard_streams()
    with _exit_on_signals(), contextlib.ExitStack() as stack:
        certificates = _certificates(config)
        if config.uds is not None:
            listeners = [stack.enter_context(unix_listener(config.uds))]
        else:
            listeners = [stack.enter_context(listener) for listener in listen(config.host, config.port)]
        connections = min(config.max_connections, _raise_file_limit() - OTHER_FILES)
        config = dataclasses.replace(config, max_connections=max(connections, 1))
        uvloop.run(_run(_begin_loading(engine), config, listeners, certificates))


def _certificates(config: ServerConfig) -> "Certificates | None":
    if config.ssl_certfile is None:
        return None
    from .edge.certificates import Certificates  # imported late, as most servers speak HTTP

    return Certificates(config)


def _begin_loading(engine: EngineConfig | Callable[[], "FleetSpec"]) -> "Fleet":
    # A process imports its modules while this process imports its own.
    process = EngineProcess() if not isinstance(engine, EngineConfig) or engine.engines is None else None
    try:
        from octavo.fleet.fleet import Fleet
        from octavo.fleet.specs import FleetSpec, ModelSpec

        spec = FleetSpec([ModelSpec(config=engine)]) if isinstance(engine, EngineConfig) else engine()
    except BaseException:
        if process is not None:
            process.end()
        raise
    return Fleet.begin(spec, process)


async def _run(
    fleet: "Fleet", config: ServerConfig, listeners: list[socket.socket], certificates: "Certificates | None"
) -> None:
    """Serve in a separate task. The first signal while it serves starts draining; any other signal cancels the task."""
    from .edge.draining import on_signals  # imported late: the engine process is already loading weights

    servers: list[DrainingServer] = []
    serving = asyncio.ensure_future(_serve(fleet, config, listeners, certificates, servers))

    def stop() -> None:
        if servers and not servers[0].should_exit:
            servers[0].stop()
        else:
            serving.cancel()

    with on_signals(stop), contextlib.suppress(asyncio.CancelledError):
        await serving


async def _serve(
    fleet: "Fleet",
    config: ServerConfig,
    listeners: list[socket.socket],
    certificates: "Certificates | None",
    servers: "list[DrainingServer]",
) -> None:
    """Load, then serve. The server is appended to `servers` when it starts."""
    from .app import create_app
    from .edge.access_log import AccessLog
    from .edge.draining import DrainingServer

    access_log = AccessLog(config.access_log, sys.stdout, config.access_log_prompts)
    spans: Spans | None = None
    audit = None
    try:
        spans, audit = _spans(config), _open_audit_log(config)
        await fleet.start()
        app = create_app(fleet, config, draining=lambda: servers[0].should_exit, audit=audit)
        handler = app if spans is None else _with_spans(app, fleet, spans)
        server = DrainingServer(
            handler, config, access_log, lambda: _announce(fleet, config, listeners[0]), certificates=certificates
        )
        servers.append(server)
        gc.enable()
        gc.freeze()  # otherwise the collector scans all modules from time to time, which delays every stream
        await server.serve(listeners)
        await app.close()
    finally:
        await fleet.close()
        access_log.close()
        if spans is not None:
            await asyncio.to_thread(spans.close)
        if audit is not None:
            audit.close()


def _open_audit_log(config: ServerConfig) -> "AuditLog | None":
    """Return the audit log that the settings name. Raises ConfigError."""
    if config.audit_log is None:
        return None
    from .audit import AuditLog  # imported late, as most servers have none

    key = read_key("audit_key", config.audit_key)
    assert key is not None
    hide_memory()
    return AuditLog(Path(config.audit_log), key)


def _spans(config: ServerConfig) -> "Spans | None":
    """Return what makes OpenTelemetry spans, if the server shall make some. Raises ConfigError."""
    if config.otlp_endpoint is None:
        return None
    from octavo.tracing.spans import Spans  # imported late, with OpenTelemetry

    return Spans(config.otlp_endpoint)


def _with_spans(app: "Dispatcher", fleet: "Fleet", spans: "Spans") -> "HttpSpans":
    from .edge.http_spans import HttpSpans  # imported late, with OpenTelemetry

    fleet.enable_spans(spans.tracer)
    return HttpSpans(app, spans.tracer)


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


def _url(config: ServerConfig, listener: socket.socket) -> str:
    """Return an address of the server to connect to."""
    scheme = "http" if config.ssl_certfile is None else "https"
    if config.uds is not None:
        return f"{scheme}://localhost"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _announce(fleet: "Fleet", config: ServerConfig, listener: socket.socket) -> None:
    url = _url(config, listener)
    model = fleet.default.name
    if fleet.default.was_loaded and fleet.default.llm.tokenizer.has_chat_template:
        route, body = "chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    else:
        route, body = "completions", {"model": model, "prompt": "Once upon a time"}
    headers = ["-H", "Content-Type: application/json"]
    if config.has_keys:
        headers += ["-H", "Authorization: Bearer KEY"]
    if config.ssl_cert_reqs == 2:
        headers += ["--cert", "CLIENT.pem"]
    if config.uds is not None:
        headers += ["--unix-socket", config.uds]
    curl = shlex.join(["curl", f"{url}/v1/{route}", *headers, "-d", json.dumps(body)])
    where = url if config.uds is None else f"the Unix socket {printable(config.uds)}"
    try:
        names = ", ".join(each.name for each in fleet.models)
        decisions = "\n".join(line for model in fleet.models for line in _decisions(model))
        typer.echo(f"\nOctavo {__version__} serves {printable(names)} on {where}; Ctrl-C ends it.\n{decisions}")
        typer.echo(f"Try it{' in a browser, or' if config.page and not config.uds else ''}:\n\n{curl}\n")
    except OSError:  # stdout is a full disk or a closed pipe; its buffer must not be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

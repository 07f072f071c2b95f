"""The server process: listen, start the engine, say that it is ready, serve, drain."""

import errno
import json
import resource
import shlex
import socket

import typer
import uvloop

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.version import __version__

from .config import ServerConfig

BACKLOG = 4096  # connections that may wait to be accepted; the kernel's somaxconn may allow fewer
MAX_FILES = 65_536  # one for each connection


def serve(config: EngineConfig, server: ServerConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, drain, and return.

    Raises ConfigError if the address cannot be had, and what loading the model raises.
    """
    with _listen(server.host, server.port) as listener:
        _allow_many_files()
        uvloop.run(_serve(AsyncLLM.from_config(config), listener))


async def _serve(llm: AsyncLLM, listener: socket.socket) -> None:
    try:
        # Imported here, as the engine process loads weights meanwhile.
        from .app import create_app
        from .edge.draining import DrainingServer

        await llm.start()
        await DrainingServer(create_app(llm), on_ready=lambda: _announce(llm, listener)).serve([listener])
    finally:
        await llm.close()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Clients that come before the engine is ready wait for it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is taken: end what uses it, or choose another --port") from None
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _announce(llm: AsyncLLM, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # listening everywhere; here is one place to call
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    model = llm.config.model_name
    if llm.tokenizer.has_chat_template:
        route, body = "chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    else:
        route, body = "completions", {"model": model, "prompt": "Once upon a time"}
    curl = shlex.join(["curl", f"{url}/v1/{route}", "-H", "Content-Type: application/json", "-d", json.dumps(body)])
    typer.echo(f"\nOctavo {__version__} serves {model} on {url}; Ctrl-C ends it. Try it:\n\n{curl}\n")

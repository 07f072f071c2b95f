"""octavo top: show live statistics of a server in the terminal."""

import os
import select
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.errors import ConfigError

if TYPE_CHECKING:
    import httpx

    from octavo.server.stats import ServerStats

KEY_VARIABLE = "OCTAVO_ADMIN_KEY"
Key = Annotated[
    str | None, typer.Option("--admin-key", help=f"The server's admin key; by default the variable {KEY_VARIABLE}.")
]
PERIOD = 1.0  # seconds between two frames
TIMEOUT = 5.0  # seconds in which the server must answer


def register(app: typer.Typer) -> None:
    app.command()(top)


def top(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="The model to show, of a server with several.")] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame, with rates measured over one second, and exit.")
    ] = False,
    key: Key = None,
) -> None:
    """Show live requests, batches, speed and KV pages of a running server, by model and engine. q or Ctrl-C ends it."""
    import httpx

    from octavo.terminal import console

    from .top_screen import frame

    url = url if "://" in url else f"http://{url}"
    with httpx.Client(timeout=TIMEOUT, headers=admin_headers(key)) as http, suppress(KeyboardInterrupt):
        before = fetch_stats(http, url)
        if not once and sys.stdout.isatty() and sys.stdin.isatty():
            watch(http, url, before, model)
            return
        time.sleep(PERIOD)
        console().print(frame(fetch_stats(http, url), before, model))


def admin_headers(key: str | None) -> dict[str, str]:
    """Return the header fields with the admin key, if there is one, or that of the environment. Raises ConfigError."""
    key = key or os.environ.get(KEY_VARIABLE)
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("the admin key must be printable ASCII")
    return {"Authorization": f"Bearer {key}"} if key else {}


def fetch_stats(http: "httpx.Client", url: str) -> "ServerStats":
    """Return the answer to GET /stats. Raises ConfigError if no Octavo server of this version answers."""
    import httpx
    import msgspec

    from octavo.server.openai.replies import ErrorReply
    from octavo.server.stats import ServerStats

    try:
        reply = http.get(f"{url.rstrip('/')}/stats")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        hint = "start one with octavo serve, or give its address with --url"
        raise ConfigError(f"no server answers at {url} ({error}): {hint}") from None
    try:
        if reply.status_code == 200:
            return msgspec.json.decode(reply.content, type=ServerStats)
        cause = msgspec.json.decode(reply.content, type=ErrorReply).error.message
    except msgspec.MsgspecError:
        cause = f"HTTP {reply.status_code} to GET /stats"
    if reply.status_code in (401, 403):
        raise ConfigError(f"the server at {url} has API keys, so its statistics need --admin-key: {cause}")
    raise ConfigError(f"the server at {url} is not an Octavo server of this version: {cause}")


def watch(http: "httpx.Client", url: str, before: "ServerStats", model: str | None) -> None:
    """Draw frames until q is pressed. If the server stops answering, show the error above the last frame."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from octavo.terminal import printable

    from .top_screen import frame

    shown = frame(before, None, model)
    with _keys() as pressed, Live(shown, screen=True, auto_refresh=False) as live:
        while not pressed("q", PERIOD):
            try:
                now = fetch_stats(http, url)
            except ConfigError as error:
                live.update(Group(Text(printable(str(error), lines=False), style="red"), shown), refresh=True)
                continue
            shown, before = frame(now, before, model), now
            live.update(shown, refresh=True)


@contextmanager
def _keys() -> Generator["_Pressed"]:
    """Switch the terminal to single keys without echo, and restore it at the end."""
    import termios
    import tty

    terminal = sys.stdin.fileno()
    settings = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield _Pressed(terminal)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, settings)


class _Pressed:
    """Waits for key presses on a terminal."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal

    def __call__(self, key: str, seconds: float) -> bool:
        """Wait up to `seconds` for `key`. Return whether it was pressed, or the terminal has closed."""
        end = time.monotonic() + seconds
        while select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))[0]:
            if os.read(self._terminal, 1) in (key.encode(), b""):
                return True
        return False

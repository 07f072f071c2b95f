"""octavo top: what a server is doing, live in the terminal."""

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

PERIOD = 1.0  # seconds between two looks at the server
PATIENCE = 5.0  # seconds that an answer may take


def register(app: typer.Typer) -> None:
    app.command()(top)


def top(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Print one frame, of two looks a second apart.")] = False,
) -> None:
    """Show requests, batches, speed and KV pages of a running server. q or Ctrl-C ends it."""
    import httpx
    from rich.console import Console

    from .top_screen import frame

    url = url if "://" in url else f"http://{url}"
    with httpx.Client(timeout=PATIENCE) as http, suppress(KeyboardInterrupt):
        before = look(http, url)
        if not once and sys.stdout.isatty() and sys.stdin.isatty():
            watch(http, url, before)
            return
        time.sleep(PERIOD)
        Console(highlight=False).print(frame(look(http, url), before))


def look(http: "httpx.Client", url: str) -> "ServerStats":
    """Raises ConfigError: no server is there, or none of this kind, or its engine is not to be had."""
    import httpx
    import msgspec

    from octavo.server.openai.replies import ErrorReply
    from octavo.server.stats import ServerStats

    try:
        reply = http.get(f"{url.rstrip('/')}/stats")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        hint = "start one with octavo serve, or say with --url where it is"
        raise ConfigError(f"no server answers at {url} ({error}): {hint}") from None
    try:
        if reply.status_code == 200:
            return msgspec.json.decode(reply.content, type=ServerStats)
        said = msgspec.json.decode(reply.content, type=ErrorReply).error.message
    except msgspec.MsgspecError:
        said = f"HTTP {reply.status_code} to GET /stats"
    raise ConfigError(f"what answers at {url} is no Octavo server of this version, or not in order: {said}")


def watch(http: "httpx.Client", url: str, before: "ServerStats") -> None:
    """Draw until q is pressed. A server that goes away may come back: the last frame stays meanwhile."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from .top_screen import frame

    shown = frame(before, None)
    with _keys() as pressed, Live(shown, screen=True, auto_refresh=False) as live:
        while not pressed("q", PERIOD):
            try:
                now = look(http, url)
            except ConfigError as error:
                live.update(Group(Text(str(error), style="red"), shown), refresh=True)
                continue
            shown, before = frame(now, before), now
            live.update(shown, refresh=True)


@contextmanager
def _keys() -> Generator["_Pressed"]:
    """The terminal without echo, and keys as they are pressed rather than line by line."""
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
    def __init__(self, terminal: int) -> None:
        self._terminal = terminal

    def __call__(self, key: str, seconds: float) -> bool:
        """Wait so long for `key`; True too if the terminal is gone."""
        end = time.monotonic() + seconds
        while select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))[0]:
            if os.read(self._terminal, 1) in (key.encode(), b""):
                return True
        return False

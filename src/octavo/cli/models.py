"""octavo models: see and change the models of a running server."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import ConfigError, EngineDead
from octavo.terminal import printable

from .top import KEY_VARIABLE, Key, admin_headers, fetch_stats

if TYPE_CHECKING:
    import httpx

LOOK = 0.5  # seconds between two looks at the progress of a load
CONNECT_SECONDS = 5.0

Url = Annotated[str, typer.Option(help="Address of the server.")]
Name = Annotated[str, typer.Argument(help="The model's name in the API.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of the model; may be given several times."),
]
LOCAL = "http://127.0.0.1:8000"


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="See, load, unload, swap and scale the models of a running server.", no_args_is_help=True)
    group.command("list")(list_models)
    group.command()(load)
    group.command()(unload)
    group.command()(swap)
    group.command()(scale)
    app.add_typer(group, name="models")


def list_models(url: Url = LOCAL, key: Key = None) -> None:
    """Print the server's models, their states and engines. Needs the admin key if the server has API keys."""
    from rich.table import Table
    from rich.text import Text

    from octavo.terminal import console

    with _client(url, key) as http:
        models = fetch_stats(http, _address(url)).models
    table = Table("model", "aliases", "state", "engines", "requests", "memory", box=None, pad_edge=False)
    for model in models:
        ready = sum(replica.is_ready for replica in model.replicas)
        cells = (
            model.name,
            ", ".join(model.aliases),
            f"{model.state}: {model.error}" if model.error else model.state,
            f"{ready} of {len(model.replicas)} ready" if model.replicas else "–",
            f"{model.frontend.live if model.frontend else 0:,}",
            f"{model.memory / 2**20:,.0f} MiB" if model.memory else "–",
        )
        table.add_row(*(Text(printable(cell, lines=False)) for cell in cells))
    console().print(table)


def load(
    name: Name,
    model: Annotated[
        str | None, typer.Option(help="For a new name: a directory, a .gguf file, a hub name or an alias.")
    ] = None,
    settings: Settings = None,
    url: Url = LOCAL,
    key: Key = None,
) -> None:
    """Load a model: one that the server has, or with --model a new one."""
    _change(url, key, {"action": "load", "name": name, "model": model, "settings": _pairs(settings)})


def unload(name: Name, url: Url = LOCAL, key: Key = None) -> None:
    """Unload a model after its running requests."""
    _change(url, key, {"action": "unload", "name": name})


def swap(
    name: Name,
    model: Annotated[
        str,
        typer.Argument(help="The new model: a directory, a .gguf file, a hub name or an alias.", show_default=False),
    ],
    settings: Settings = None,
    url: Url = LOCAL,
    key: Key = None,
) -> None:
    """Replace a model while requests go on: they finish on the old one, later ones go to the new one."""
    _change(url, key, {"action": "swap", "name": name, "model": model, "settings": _pairs(settings)})


def scale(
    name: Name,
    replicas: Annotated[int, typer.Argument(help="The number of engines.", show_default=False)],
    url: Url = LOCAL,
    key: Key = None,
) -> None:
    """Start engines of a model, or drain some: their requests continue on the others."""
    _change(url, key, {"action": "scale", "name": name, "replicas": replicas})


def _pairs(settings: list[str] | None) -> dict[str, str]:
    pairs = [each.partition("=") for each in settings or ()]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise ConfigError(f"--set takes NAME=VALUE, not {name!r}")
    return {name: value for name, _, value in pairs}


def _address(url: str) -> str:
    return (url if "://" in url else f"http://{url}").rstrip("/")


def _client(url: str, key: str | None = None) -> "httpx.Client":
    """Return a client of the server. Raises ConfigError."""
    import httpx

    try:
        return httpx.Client(
            base_url=_address(url), headers=admin_headers(key), timeout=httpx.Timeout(None, connect=CONNECT_SECONDS)
        )
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url[:200]} is no address of a server ({error})") from None


def _change(url: str, key: str | None, body: dict[str, Any]) -> None:
    """Send a change, show its progress, and print the result. Raises ConfigError, EngineDead."""
    body = {name: value for name, value in body.items() if value not in (None, {})}
    with _client(url, key) as http:
        reply: Future[dict[str, str]] = Future()
        # A daemon thread: Ctrl-C ends this command at once. The server finishes the change in any case.
        Thread(target=_settle, args=(reply, partial(_post, http, body)), daemon=True).start()
        if body["action"] != "unload":
            _show_progress(http, _address(url), body["name"], reply)
        result = reply.result()
    typer.echo(printable(f"{result['name']} is {result['state']}", lines=False))


def _settle(future: "Future[dict[str, str]]", work: Callable[[], dict[str, str]]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _show_progress(http: "httpx.Client", url: str, name: str, reply: "Future[dict[str, str]]") -> None:
    from octavo.terminal import console

    with console(stderr=True).status(f"{printable(name, lines=False)} is loading") as status:
        while not _is_done(reply, LOOK):
            try:
                models = fetch_stats(http, url).models
            except ConfigError:
                continue
            for model in models:
                if model.name == name and model.state == "loading":
                    text = ", ".join(replica.status for replica in model.replicas) or "is loading"
                    status.update(printable(f"{name}: {text}", lines=False))


def _is_done(reply: "Future[dict[str, str]]", seconds: float) -> bool:
    """Wait for a reply for so many seconds. Return whether it has come."""
    return bool(wait((reply,), seconds).done)


def _post(http: "httpx.Client", body: dict[str, Any]) -> dict[str, str]:
    """Return the server's answer to a change. Raises ConfigError, and EngineDead if the server could not do it."""
    import httpx
    import msgspec

    from octavo.server.openai.replies import ErrorReply

    try:
        reply = http.post("/v1/admin/models", json=body)
    except httpx.HTTPError as error:
        hint = "start one with octavo serve, or give its address with --url"
        raise ConfigError(f"no server answers at {http.base_url} ({error}): {hint}") from None
    try:
        if reply.status_code == 200:
            return msgspec.json.decode(reply.content, type=dict[str, str])
        message = msgspec.json.decode(reply.content, type=ErrorReply).error.message
    except msgspec.MsgspecError:
        raise ConfigError(f"the server at {http.base_url} is not an Octavo server of this version") from None
    if reply.status_code == 401:
        message += f": give it with --admin-key or in the variable {KEY_VARIABLE}"
    raise EngineDead(message) if reply.status_code >= 500 else ConfigError(message)

"""octavo models: see and change the models of a running server."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import ConfigError, EngineDead
from octavo.terminal import printable

if TYPE_CHECKING:
    import httpx

    from octavo.server.stats import ModelStats

KEY_VARIABLE = "OCTAVO_ADMIN_KEY"
LOOK = 0.5  # seconds between two looks at the progress of a load
CONNECT_SECONDS = 5.0

Url = Annotated[str, typer.Option(help="Address of the server.")]
Key = Annotated[
    str | None, typer.Option("--admin-key", help=f"The server's admin key; by default the variable {KEY_VARIABLE}.")
]
Name = Annotated[str, typer.Argument(help="The model's name in the API.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of the model; may be given several times."),
]
LOCAL = "http://127.0.0.1:8000"


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="See, load, unload and swap the models of a running server.", no_args_is_help=True)
    group.command("list")(list_models)
    group.command()(load)
    group.command()(unload)
    group.command()(swap)
    app.add_typer(group, name="models")


def list_models(url: Url = LOCAL, key: Key = None) -> None:
    """Print the server's models, their states and engines. Needs no key."""
    from rich.table import Table
    from rich.text import Text

    from octavo.terminal import console

    with _client(url, None) as http:
        models = _stats(http)
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


def _pairs(settings: list[str] | None) -> dict[str, str]:
    pairs = [each.partition("=") for each in settings or ()]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise ConfigError(f"--set takes NAME=VALUE, not {name!r}")
    return {name: value for name, _, value in pairs}


def _client(url: str, key: str | None) -> "httpx.Client":
    import httpx

    url = url if "://" in url else f"http://{url}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(None, connect=CONNECT_SECONDS))


def _change(url: str, key: str | None, body: dict[str, Any]) -> None:
    """Send a change, show its progress, and print the result. Raises ConfigError, EngineDead."""
    key = key or os.environ.get(KEY_VARIABLE)
    body = {name: value for name, value in body.items() if value}
    with _client(url, key) as http, ThreadPoolExecutor(1) as thread:
        reply = thread.submit(_request, http, "POST", "/v1/admin/models", json=body)
        if body["action"] != "unload":
            _show_progress(http, body["name"], reply)
        result = reply.result()
    typer.echo(printable(f"{result['name']} is {result['state']}", lines=False))


def _show_progress(http: "httpx.Client", name: str, reply: Any) -> None:
    from octavo.terminal import console

    with console(stderr=True).status(f"{printable(name, lines=False)} is loading") as status:
        while not reply.done():
            time.sleep(LOOK)
            try:
                models = _stats(http)
            except ConfigError:
                continue
            for model in models:
                if model.name == name and model.state == "loading":
                    text = ", ".join(replica.status for replica in model.replicas) or "is loading"
                    status.update(printable(f"{name}: {text}", lines=False))


def _stats(http: "httpx.Client") -> "list[ModelStats]":
    import msgspec

    from octavo.server.stats import ServerStats

    return msgspec.convert(_request(http, "GET", "/stats"), ServerStats).models


def _request(http: "httpx.Client", method: str, path: str, **arguments: Any) -> Any:
    """Return the JSON answer. Raises ConfigError, and EngineDead if the server could not do it."""
    import httpx

    try:
        reply = http.request(method, path, **arguments)
        answer = reply.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        hint = "start one with octavo serve, or give its address with --url"
        raise ConfigError(f"no Octavo server answers at {http.base_url} ({error}): {hint}") from None
    if reply.status_code == 200:
        return answer
    message = answer["error"]["message"] if isinstance(answer, dict) and "error" in answer else f"{reply}"
    raise EngineDead(message) if reply.status_code >= 500 else ConfigError(message)

"""octavo keys: add, list, rotate and revoke the API keys in a file."""

from pathlib import Path
from typing import Annotated

import typer

from octavo.terminal import printable

File = Annotated[
    Path, typer.Option("--keys", envvar="OCTAVO_KEYS", help="The file of keys, as for octavo serve --keys.")
]
Name = Annotated[str, typer.Argument(help="The key's name.", show_default=False)]
DEFAULT = Path("keys.yaml")


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Add, list, rotate and revoke API keys. A running server follows the file.", no_args_is_help=True
    )
    group.command()(add)
    group.command("list")(list_keys)
    group.command()(rotate)
    group.command()(revoke)
    app.add_typer(group, name="keys")


def add(
    name: Name,
    keys: File = DEFAULT,
    tenant: Annotated[
        str | None, typer.Option(help="Tenant of the key's requests; by default the key's name.", show_default=False)
    ] = None,
    names_tenants: Annotated[
        bool, typer.Option("--names-tenants", help="Let the client name tenants (X-Octavo-Tenant), as a proxy does.")
    ] = False,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests in any 60 seconds.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Tokens of prompts and answers of the requests that begin in any 60 seconds.")
    ] = None,
    monthly_tokens: Annotated[
        int | None, typer.Option(help="Tokens of prompts and answers in a calendar month (UTC).")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens that a completion may have.")] = None,
    concurrent_requests: Annotated[int | None, typer.Option(help="Requests at the same time.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Share of the machine relative to others, under --scheduling-policy fair.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model that may be used; may be given several times. Default: all.")
    ] = None,
    route: Annotated[
        list[str] | None,
        typer.Option(help="Beginning of the paths that may be used, such as /v1/embeddings. Default: all."),
    ] = None,
    min_priority: Annotated[
        int | None, typer.Option(help="Least priority value of requests; lower ones run sooner.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="Date after which the key is refused, such as 2027-12-31.", show_default=False)
    ] = None,
) -> None:
    """Add a key to the file, and print it: it is shown only now."""
    from octavo.tenants.key_file import add_key

    secret = add_key(
        keys,
        name=name,
        tenant=tenant,
        names_tenants=names_tenants,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        monthly_tokens=monthly_tokens,
        max_new_tokens=max_new_tokens,
        concurrent_requests=concurrent_requests,
        weight=weight,
        models=model or None,
        routes=route or None,
        min_priority=min_priority,
        expires=expires,
    )
    _show(secret, keys)


def list_keys(keys: File = DEFAULT) -> None:
    """Print the keys in the file with their owners and limits, without the secrets."""
    import time

    from rich.table import Table
    from rich.text import Text

    from octavo.tenants.key_file import read_keys
    from octavo.terminal import console

    titles = ("name", "tenant", "requests\na minute", "tokens\na minute", "tokens\na month", "at\nonce", "weight")
    table = Table(*titles, "models", "routes", "expires", box=None, pad_edge=False)
    for key in read_keys(keys):
        cells = (
            key.name,
            "any" if key.names_tenants else key.owner,
            key.requests_per_minute or "–",
            key.tokens_per_minute or "–",
            key.monthly_tokens or "–",
            key.concurrent_requests or "–",
            "–" if key.weight is None else f"{key.weight:g}",
            ", ".join(key.models) if key.models else "all",
            ", ".join(key.routes) if key.routes else "all",
            f"{key.expires}{' (expired)' if key.is_expired(time.time()) else ''}" if key.expires else "never",
        )
        table.add_row(*(Text(printable(str(cell), lines=False)) for cell in cells))
    console().print(table)


def rotate(name: Name, keys: File = DEFAULT) -> None:
    """Replace a key by a new one with the same name and limits, and print it. The old one is refused."""
    from octavo.tenants.key_file import rotate_key

    _show(rotate_key(keys, name), keys)


def revoke(name: Name, keys: File = DEFAULT) -> None:
    """Remove a key from the file: it is refused from now on. Running requests go on."""
    from octavo.tenants.key_file import revoke_key

    revoke_key(keys, name)
    typer.echo(f"{printable(name, lines=False)} is revoked")


def _show(secret: str, path: Path) -> None:
    typer.echo(secret)
    typer.echo(f"octavo: keep this key, {path} has only its hash; octavo serve --keys {path} accepts it", err=True)

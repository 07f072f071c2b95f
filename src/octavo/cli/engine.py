"""octavo engine: an engine alone, for frontends on other machines."""

from typing import Annotated

import typer

from octavo.config import EngineConfig

from .flags import Command, engine_flags


def register(app: typer.Typer) -> None:
    app.command(cls=Command)(engine)


@engine_flags
def engine(
    config: EngineConfig,
    listen: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Address to listen on, such as tcp://0.0.0.0:7000; * stands for all."),
    ] = "tcp://127.0.0.1:7000",
) -> None:
    """Run one engine, which frontends use over the network: octavo serve --engines tcp://HOST:7000 (docs/network.md).

    Beyond this machine, both sides need the same secret: openssl rand -hex 32 > secret, and --secret-file secret.
    """
    if config.node_rank > 0:
        from .node import run_node

        run_node(config)
        return
    from octavo.network.run import run_engine

    run_engine(config, listen)

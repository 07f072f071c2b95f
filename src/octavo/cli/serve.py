"""octavo serve: an OpenAI-compatible HTTP server."""

from typing import Annotated

import typer

from octavo.config import EngineConfig

from .engine_flags import engine_flags


def register(app: typer.Typer) -> None:
    app.command()(serve)


@engine_flags
def serve(
    config: EngineConfig,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does."""
    from octavo.server.run import serve as run

    run(config, host, port)

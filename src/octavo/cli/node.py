"""One of several machines over which a model is divided, other than the first (octavo serve --node-rank 1)."""

import typer

from octavo.config import EngineConfig


def run_node(config: EngineConfig) -> None:
    """Run this machine's ranks until the engine is closed, or until Ctrl-C. Raises OctavoError."""
    from octavo.backends.cpu.node_main import run_node as run

    typer.echo(f"A part of {config.model_name} for the server on {config.master_addr}; Ctrl-C ends it.")
    run(config, typer.echo)

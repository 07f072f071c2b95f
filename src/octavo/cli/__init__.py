"""The command `octavo`. Each command is a module that imports what it needs when it runs, so that --help is quick."""

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn, TextIO

import typer

from octavo.errors import EngineDead, OctavoError
from octavo.terminal import printable
from octavo.version import __version__

_COMMANDS = (
    "serve",
    "engine",
    "generate",
    "chat",
    "run-batch",
    "enrich",
    "top",
    "trace",
    "models",
    "keys",
    "audit",
    "config",
    "doctor",
    "pull",
    "quantize",
    "encrypt",
    "bench",
    "simulate",
    "tune",
)
_ENGINE_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def _app(commands: Sequence[str]) -> typer.Typer:
    app = typer.Typer(
        help="Octavo: high-throughput LLM serving. The same request gives the same tokens, every time.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={
            "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_batch_size as well as --max-batch-size
            "help_option_names": ["-h", "--help"],
        },
    )
    app.callback(invoke_without_command=True)(_root)
    for name in commands:
        import_module(f"{__name__}.{name.replace('-', '_')}").register(app)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"octavo {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 on success, 1 after a failure of an engine, 2 after an error that the user can correct, 130 after
    Ctrl-C. Errors are printed as one line.
    """
    _set_errors(sys.stdin, "surrogateescape")  # a prompt that is not valid text becomes an InvalidRequest
    _set_errors(sys.stdout, "replace")  # a model may write characters that the terminal's encoding lacks
    try:
        # Build only the flags of the command that is run: building those of all commands takes noticeable time.
        commands = [name for name in sys.argv[1:2] if name in _COMMANDS] or _COMMANDS
        code: Any = _app(commands)(prog_name="octavo", standalone_mode=False)
        if sys.stdout is not None:  # None if the caller closed it
            sys.stdout.flush()
    except OctavoError as error:
        _fail(str(error), _ENGINE_FAILED if isinstance(error, EngineDead) else _USAGE)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "octavo"
        message = error.format_message().rstrip(".")
        _fail(f"{message}{' See' if message.endswith('?') else '; see'} {command} --help")
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has ended; nothing may be written to stdout at exit either
        _discard_output()
        code = 0
    except OSError as error:
        if error.filename is not None or sys.stdout is None:  # the error is not a failure of stdout
            raise
        _discard_output()
        _fail(f"cannot write the output: {error.strerror}")
    sys.exit(code if isinstance(code, int) else 0)


def _discard_output() -> None:
    """Discard what is still buffered for stdout, so that nothing is written at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_errors(stream: TextIO, errors: str) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)


def _fail(message: str, code: int = _USAGE) -> NoReturn:
    print(f"octavo: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)

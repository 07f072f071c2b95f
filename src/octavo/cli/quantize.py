"""octavo quantize: a model's weights in 8 or 4 bits, written as a checkpoint that loads without quantizing again."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.errors import ConfigError, OctavoError

if TYPE_CHECKING:
    import numpy as np

    from octavo.model.spec import DecoderSpec
    from octavo.weights import Parameter


def register(app: typer.Typer) -> None:
    app.command()(quantize)


def quantize(
    source: Annotated[str, typer.Argument(help="A hub name, a directory, a .gguf file, or the alias smollm2.")],
    target: Annotated[Path, typer.Argument(help="The directory to write.")],
    bits: Annotated[int, typer.Option(help="8, or 4 (8 for embedding, head and last layer).")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that octavo quantize wrote before.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Quantize a model once: writes a directory that every command takes as a model."""
    from octavo.backends.cpu import quantize
    from octavo.frontend.progress import loading_bar
    from octavo.model import describe_model
    from octavo.model.decoder import needs_8_bits
    from octavo.weights import open_checkpoint, resolve
    from octavo.weights.packed import write_packed

    if bits not in (8, 4):
        raise ConfigError(f"bits must be 8 or 4, not {bits}")
    path = resolve(source, revision)
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    named_parts = [(name, part) for name, parameter in parameters.items() for part in parameter.parts]
    tensors = {part.name: part for _, part in named_parts}
    bits_of = {part.name: 8 if needs_8_bits(spec, name) else bits for name, part in named_parts}
    _check_target(target, path, force)
    with _appearing(target) as folder:
        _write_tokenizer(path, folder)
        importances = _importances(spec, parameters) if bits == 4 else {}
        with loading_bar("quantizing") as progress:
            write_packed(folder, checkpoint.config, tensors, bits_of, quantize, importances, progress)
    typer.echo(f"{target}  {sum(file.stat().st_size for file in target.iterdir()) / 1e6:,.0f} MB")


def _importances(spec: "DecoderSpec", parameters: "Mapping[str, Parameter]") -> "dict[str, np.ndarray]":
    """How much the errors of each column count, by tensor."""
    from octavo.backends.cpu import measure_importances
    from octavo.config import EngineConfig
    from octavo.frontend.progress import loading_bar

    importances: dict[str, np.ndarray] = {}
    done, total = 0, sum(p.nbytes for name, p in parameters.items() if name.startswith("layers."))
    with loading_bar("calibrating") as progress:
        for name, importance in measure_importances(spec, parameters, EngineConfig().num_threads):
            importances |= {part.name: importance for part in parameters[name].parts}
            done += parameters[name].nbytes
            progress(done, total)
    return importances


def _check_target(target: Path, source: Path, force: bool) -> None:
    from octavo.weights.packed import METHOD
    from octavo.weights.safetensors import read_config

    if not target.exists():
        return
    if not force:
        raise ConfigError(f"{target} exists; choose another name, or replace it with --force")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{target} holds the model that is to be quantized; choose another name")
    try:
        settings = read_config(target).get("quantization_config")
    except OctavoError:
        settings = None
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        raise ConfigError(f"{target} is nothing that octavo quantize wrote: --force does not replace it")


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when it is complete and vanishes if it never is."""
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    replaced = folder.with_suffix(".replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _write_tokenizer(source: Path, folder: Path) -> None:
    """The files beside the weights: copied from a directory, made from the metadata of a .gguf file."""
    from octavo.text import Tokenizer

    tokenizer = Tokenizer.load(source)  # which also refuses a source that could not be used
    if source.is_file():
        tokenizer.save(folder)
        return
    for file in source.iterdir():
        is_weights = file.name == "config.json" or file.name.endswith(".index.json")
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.is_file() and not is_weights:
            shutil.copy(file, folder)

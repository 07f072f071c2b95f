"""octavo quantize: quantize a model to 8 or 4 bits and write it as a checkpoint that loads without quantizing again."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.errors import ConfigError, OctavoError

from .output_folder import complete_or_absent, output_folder

if TYPE_CHECKING:
    import numpy as np

    from octavo.model.spec import DecoderSpec
    from octavo.weights import Parameter


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(quantize)


def quantize(
    source: Annotated[str, typer.Argument(help="A hub name, a directory, a .gguf file, or the alias smollm2.")],
    target: Annotated[Path, typer.Argument(help="The directory to write.")],
    bits: Annotated[
        int, typer.Option(help="8 or 4 bits; with 4, the embedding, the head and the last layer still have 8.")
    ] = 8,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a directory that octavo quantize wrote earlier.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Quantize a model and write it to a directory, which every command accepts as a model."""
    from octavo.backends.cpu import quantize
    from octavo.frontend.progress import loading_bar
    from octavo.model import describe_model
    from octavo.model.decoder import needs_8_bits
    from octavo.weights import open_checkpoint, resolve
    from octavo.weights.packed import write_packed

    if bits not in (8, 4):
        raise ConfigError(f"bits must be 8 or 4, not {bits}")
    target = output_folder(target)
    path = resolve(source, revision)
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    named_parts = [(name, part) for name, parameter in parameters.items() for part in parameter.parts]
    tensors = {part.name: part for _, part in named_parts}
    bits_of = {part.name: 8 if needs_8_bits(spec, name) else bits for name, part in named_parts}
    _check_target(target, path, force)
    with complete_or_absent(target) as folder:
        _write_tokenizer(path, folder)
        importances = _importances(spec, parameters) if bits == 4 else {}
        with loading_bar("quantizing") as progress:
            write_packed(folder, checkpoint.config, tensors, bits_of, quantize, importances, progress)
    typer.echo(f"{target}  {sum(file.stat().st_size for file in target.iterdir()) / 1e6:,.0f} MB")


def _importances(spec: "DecoderSpec", parameters: "Mapping[str, Parameter]") -> "dict[str, np.ndarray]":
    """Return the importance of each column of the tensors, by tensor (see octavo.weights.packed)."""
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
    """Raise ConfigError if `target` exists and may not be replaced."""
    from octavo.weights.packed import METHOD
    from octavo.weights.safetensors import read_config

    if not target.exists():
        return
    if not force:
        raise ConfigError(f"{target} exists; choose another name, or use --force to replace it")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{target} contains the model to be quantized; choose another name")
    try:
        settings = read_config(target).get("quantization_config")
    except OctavoError:
        settings = None
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        raise ConfigError(f"{target} was not written by octavo quantize: --force does not replace it")


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer's files: copied from a directory, or converted from the metadata of a .gguf file."""
    from octavo.text import Tokenizer

    tokenizer = Tokenizer.load(source)  # also checks that the source has a tokenizer that works
    if source.is_file():
        tokenizer.save(folder)
        return
    for file in source.iterdir():
        is_weights = file.name == "config.json" or file.name.endswith(".index.json")
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.is_file() and not is_weights:
            shutil.copy(file, folder)

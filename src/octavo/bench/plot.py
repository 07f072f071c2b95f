"""Plots of a roofline report: throughput by batch size, and cost per token by context."""

import importlib.util
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError

SUFFIXES = (".png", ".svg")


def check_plot(file: Path) -> None:
    """Raise ConfigError if no plot can be written to `file`. Called before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'octavo[plot]'")
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"--plot must name a file that ends in {' or '.join(SUFFIXES)}, not {file}")
    if not file.parent.is_dir():
        raise ConfigError(f"cannot write {file}: there is no directory {file.parent}")


def plot(title: str, steps: list[dict[str, Any]], file: Path) -> None:
    """Draw the decode steps of a roofline report: measured, and what is possible. Raises ConfigError."""
    from matplotlib.figure import Figure

    decodes = [step for step in steps if step["phase"] == "decode"]
    shortest = min(step["context"] for step in decodes)
    by_batch = [step for step in decodes if step["context"] == shortest]
    by_context = sorted((step for step in decodes if step["batch_size"] == 1), key=lambda step: step["context"])

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    batches = [step["batch_size"] for step in by_batch]
    left.plot(batches, [step["tokens_per_second"] for step in by_batch], "o-", label="measured")
    left.plot(batches, [step["tokens_per_second"] / step["achieved"] for step in by_batch], "k--", label="possible")
    left.set(xscale="log", yscale="log", xlabel="Batch size", ylabel=f"Tokens per second, context {shortest}")
    left.set_xticks(batches, [str(batch) for batch in batches])
    left.minorticks_off()
    contexts = [step["context"] for step in by_context]
    right.plot(contexts, [step["milliseconds"] for step in by_context], "o-", label="measured")
    right.plot(contexts, [step["floor_milliseconds"] for step in by_context], "k--", label="possible")
    right.set(xlabel="Context (tokens)", ylabel="Milliseconds per token, one sequence", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None

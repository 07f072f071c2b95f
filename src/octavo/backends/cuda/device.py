"""The device that a setting names, and what it says when its memory is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton

from octavo.errors import ConfigError, OutOfMemory


def interpreting() -> bool:
    """Return whether Triton's interpreter runs the kernels, on this processor (TRITON_INTERPRET=1, for tests)."""
    return bool(triton.knobs.runtime.interpret)


def find_device(name: str) -> torch.device:
    """Return the device that a setting names: auto, cuda or cuda:N. Raises ConfigError if there is none."""
    if interpreting():
        return torch.device("cpu")
    device = torch.device("cuda" if name == "auto" else name)
    if device.type != "cuda":
        raise ConfigError(f"the cuda backend runs on device cuda, not {name}; use device cuda or backend cpu")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        found = f"PyTorch finds {count} GPUs" if count else "PyTorch finds no GPU"
        raise ConfigError(f"device {name} is not there: {found}; see octavo doctor, or use device cpu")
    if torch.cuda.get_device_capability(index) < (8, 0):
        raise ConfigError(f"device {name} computes no bfloat16; the cuda backend needs an Ampere GPU or a later one")
    return torch.device("cuda", index)


def devices_of_ranks(name: str, ranks: int) -> list[str]:
    """Return the devices of the ranks of a model: the one that a setting names, and those after it.

    Raises ConfigError if there are not as many.
    """
    if interpreting():
        return [name] * ranks
    first, count = find_device(name).index or 0, torch.cuda.device_count()
    if first + ranks > count:
        raise ConfigError(
            f"tensor_parallel_size {ranks} needs as many GPUs, and PyTorch finds {count}"
            + (f" from cuda:0 on, of which the first {first} are not for this engine" if first else "")
        )
    return [f"cuda:{first + rank}" for rank in range(ranks)]


def place_engine(name: str, ranks: int, number: int, engines: int) -> tuple[str, int]:
    """Return the first device of an engine, and how many engines share it.

    With `auto` and `cuda` each engine has GPUs of its own as long as there are some, then they share them evenly; with
    cuda:N all engines are on the same ones.

    Args:
        number: that of the engine, from 0.
        engines: how many there are.
    """
    places = 0 if interpreting() else torch.cuda.device_count() // ranks
    if name not in ("auto", "cuda") or not places:
        return name, engines
    place = number % places
    return f"cuda:{place * ranks}", len(range(place, engines, places))


def name_of(device: torch.device) -> str:
    """Return the name of the device, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def architecture(device: torch.device) -> str:
    """Return the architecture that kernels are compiled for, such as sm90."""
    return "sm{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "interpreter"


@contextmanager
def or_out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Raise OutOfMemory, which says what did not fit and what to do, if PyTorch finds no memory on the device."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemory(f"{what} in the device's memory; {advice}") from None

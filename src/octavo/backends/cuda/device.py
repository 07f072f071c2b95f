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

"""The bytes that a model's weights take on the device, from the headers of its files. Imports no PyTorch."""

from collections.abc import Mapping
from math import prod

from octavo.formats.blocks import BLOCK_FORMATS
from octavo.model.spans import MOST, UNIT
from octavo.weights.tensor import Parameter, Tensor

_FOUR_BIT_FORMATS = ("Q4_0", "Q4_1", "Q4_K", "W4G32")  # those that stored_integers.py reads


def bytes_of_weights(parameters: Mapping[str, Parameter], quantization: str) -> int:
    """Return about how many bytes `load_weights` takes (weights.py), without reading them."""
    total = 0
    for name, parameter in parameters.items():
        only_looked_up = name == "embed" and "head" in parameters
        in_integers = 0 if only_looked_up else _bytes_in_integers(name, parameter, quantization)
        total += in_integers
        if name == "embed" or not in_integers:
            total += 2 * prod(parameter.shape)
    return total


def has_four_bits(parameter: Parameter) -> bool:
    """Return whether a parameter can stay in the 4 bits that its file has."""
    return (
        len(parameter.shape) == 2
        and parameter.shape[1] % UNIT == 0
        and all(part.format in _FOUR_BIT_FORMATS and _has_whole_blocks(part) for part in parameter.parts)
    )


def _has_whole_blocks(part: Tensor) -> bool:
    """Return whether no block of a tensor's format has columns that the tensor lacks, as a rank's part may."""
    return part.first_column == 0 and part.shape[1] % BLOCK_FORMATS[part.format].values == 0


def four_bit_bytes(parameter: Parameter) -> int:
    """Return at most how many bytes a parameter for which `has_four_bits` takes in 4 bits."""
    rows, columns = parameter.shape
    half_precision = all(part.format in ("Q4_0", "Q4_1") for part in parameter.parts)
    return rows * columns // 2 + rows * columns // 32 * (4 if half_precision else 8)


def _bytes_in_integers(name: str, parameter: Parameter, quantization: str) -> int:
    """Return the bytes of a parameter in integers, 0 if it stays in bfloat16."""
    if quantization == "8bit" and len(parameter.shape) == 2:
        spans = MOST if name.endswith((".out", ".down")) else 1  # at most
        return prod(parameter.shape) + 4 * parameter.shape[0] * spans
    return four_bit_bytes(parameter) if quantization in ("auto", "4bit") and has_four_bits(parameter) else 0

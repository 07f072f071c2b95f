"""The header of a GGUF file: metadata and the table of tensors.

The gguf package's GGUFReader makes several numpy views for every string: 1.9 s for SmolLM2's vocabulary, more than all
the rest of a start together, and it believes every count it reads. This reader takes 0.03 s, and checks every size
against the file. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, ModelNotFound, UnsupportedModel

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# GGML type -> its name, and elements and bytes of a block. The gguf package has it too, but takes 0.1 s to import.
GGUF_FORMATS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}
_LONGEST_ARRAY = 10_000_000  # a vocabulary has a few hundred thousand entries
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """`shape` is (rows, columns) or (n,), GGUF's order reversed. Its bytes are start:stop of the file."""

    name: str
    shape: tuple[int, ...]
    format: str  # "F32", "Q4_K", ...
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """`metadata`: numbers, booleans, strings and lists of them, by key. `mapped`: the whole file, read-only."""

    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    mapped: mmap.mmap


def read_header(path: Path) -> GgufHeader:
    """Map `path` and parse its header. Raises ModelNotFound, DamagedWeights or UnsupportedModel."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # what mmap says of an empty file
        raise DamagedWeights(f"{path} is empty; download it again") from None
    try:
        return _Parser(mapped).header()
    except (_Malformed, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise DamagedWeights(f"{path} is no GGUF file or is damaged ({error}); download it again") from None
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from None


class _Malformed(Exception):
    """What is wrong with the file, in a few words."""


class _Parser:
    """Reads on from `at`. Reads past the end of the file end in struct.error or _Malformed."""

    def __init__(self, mapped: mmap.mmap):
        self.mapped, self.size, self.at = mapped, len(mapped), 0

    def header(self) -> GgufHeader:
        if self.mapped[:4] != b"GGUF":
            raise _Malformed("it does not begin with GGUF")
        self.at = 4
        if (version := self.u32()) not in (2, 3):
            raise UnsupportedModel(f"GGUF version {version} is not supported; convert it to version 3")
        num_tensors, num_keys = self.count(smallest=24), self.count(smallest=12)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                raise _Malformed(f"key {key!r} twice")
            metadata[key] = self.value(self.u32())
        infos = [self.tensor_info() for _ in range(num_tensors)]
        if len({name for name, *_ in infos}) < num_tensors:
            raise _Malformed("two tensors of one name")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise _Malformed(f"alignment {alignment!r}")
        data = -(-self.at // alignment) * alignment
        return GgufHeader(metadata, [self.tensor(data, *info) for info in infos], self.mapped)

    def u32(self) -> int:
        (value,) = _U32.unpack_from(self.mapped, self.at)
        self.at += 4
        return int(value)

    def u64(self) -> int:
        (value,) = _U64.unpack_from(self.mapped, self.at)
        self.at += 8
        return int(value)

    def count(self, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each, all of which must still fit in the file."""
        count = self.u64()
        if count * smallest > self.size - self.at:
            raise _Malformed(f"a count of {count} does not fit in the file")
        return count

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        mapped, unpack, at, size = self.mapped, _U64.unpack_from, self.at, self.size  # locals: this is the hot loop
        strings = []
        for _ in range(count):
            start = at + 8
            at = start + unpack(mapped, at)[0]
            if at > size:
                raise _Malformed("a string runs past the end of the file")
            strings.append(mapped[start:at].decode())
        self.at = at
        return strings

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.u32())
        return self.scalars(kind, 1)[0]

    def array(self, kind: int) -> list[Any]:
        count = self.count(smallest=8 if kind == _STRING else 1)
        if count > _LONGEST_ARRAY:
            raise _Malformed(f"an array of {count} values")
        return self.strings(count) if kind == _STRING else self.scalars(kind, count)

    def scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise _Malformed(f"value type {kind}")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        start, self.at = self.at, self.at + count * dtype.itemsize
        if self.at > self.size:
            raise _Malformed("an array runs past the end of the file")
        values: list[Any] = np.frombuffer(self.mapped, dtype, count, start).tolist()
        return values

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        if not 1 <= (num_dims := self.u32()) <= 4:
            raise _Malformed(f"tensor {name!r} has {num_dims} dimensions")
        dims = tuple(self.u64() for _ in range(num_dims))
        return name, dims[::-1], self.u32(), self.u64()

    def tensor(self, data: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        if kind not in GGUF_FORMATS:
            supported = ", ".join(format for format, _, _ in GGUF_FORMATS.values())
            raise UnsupportedModel(f"tensor {name!r} is stored as {_type_name(kind)}; supported are {supported}")
        format, block_elements, block_bytes = GGUF_FORMATS[kind]
        elements = math.prod(shape)
        start = data + offset
        stop = start + elements // block_elements * block_bytes
        if elements == 0 or shape[-1] % block_elements or stop > self.size:
            raise _Malformed(f"tensor {name!r} of shape {list(shape)} does not fit in the file")
        return GgufTensor(name, shape, format, start, stop)


def _type_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType(kind).name if kind in set(GGMLQuantizationType) else f"unknown GGML type {kind}"

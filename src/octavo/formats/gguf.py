"""The header of a GGUF file: metadata and the table of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).

The gguf package's GGUFReader creates several numpy views for every string, which takes 1.9 s for the vocabulary of
SmolLM2, more than the rest of a start together, and it trusts every count that it reads. This reader takes 0.03 s and
checks every size against the file.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, UnsupportedModel, shortened

from .blocks import GGML_TYPES
from .files import MappedFile, ModelPath, map_file

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# Limits on what is read into memory, since a sparse file may claim any size. The largest vocabularies have a header of
# some 20 MB, and 1.5 million tokens, scores, types and merges.
_MAX_HEADER_BYTES = 128 << 20
_MAX_ARRAY_VALUES = 4_000_000  # of all arrays together
_MAX_KEYS, _MAX_TENSORS = 10_000, 100_000


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the table of tensors.

    `shape` is (rows, columns) or (n,), which is GGUF's order reversed. `format` is a name in BLOCK_FORMATS. The
    tensor's bytes are start:stop of the file.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """The content of a GGUF file's header.

    `metadata`: numbers, booleans, strings and lists of these, by key. `mapped`: the whole file, read-only.
    """

    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    mapped: MappedFile


def read_header(path: ModelPath) -> GgufHeader:
    """Map the file at `path` and parse its header.

    Raises:
        ModelNotFound: There is no such regular file, or it may not be read.
        DamagedWeights: It is not a GGUF file, or it is truncated or inconsistent.
        UnsupportedModel: Its version, or the format of one of its tensors, is not supported.
    """
    mapped = map_file(path)
    try:
        return _Parser(mapped).header()
    except (_Malformed, struct.error, UnicodeDecodeError, OverflowError) as error:
        reason = shortened(error)
        raise DamagedWeights(f"{path} is not a GGUF file or is damaged ({reason}); download it again") from None
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from None


class _Malformed(Exception):
    """A file that violates the format. The message names the violation in a few words."""


class _Parser:
    """Reads values one after another, from offset `at` on. Raises struct.error or _Malformed at the end of the file."""

    def __init__(self, file: MappedFile):
        self.file, self.mapped, self.at = file, file.data, 0
        self.size = min(len(file.data), _MAX_HEADER_BYTES)
        self.array_values = 0  # read so far

    def header(self) -> GgufHeader:
        if self.mapped[:4] != b"GGUF":
            raise _Malformed("it does not begin with GGUF")
        self.at = 4
        if (version := self.u32()) not in (2, 3):
            raise UnsupportedModel(f"GGUF version {version} is not supported; convert it to version 3")
        num_tensors = self.count(smallest=24, limit=_MAX_TENSORS)
        num_keys = self.count(smallest=12, limit=_MAX_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                raise _Malformed(f"key {key!r} occurs twice")
            metadata[key] = self.value(self.u32())
        infos = [self.tensor_info() for _ in range(num_tensors)]
        if len({name for name, *_ in infos}) < num_tensors:
            raise _Malformed("two tensors have the same name")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _Malformed(f"alignment {alignment!r} is not a power of two")
        return GgufHeader(metadata, self.lay_out(infos, alignment), self.file)

    def lay_out(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> list[GgufTensor]:
        """Locate the tensors. As in llama.cpp, each begins at the aligned end of the one before it."""
        data = -(-self.at // alignment) * alignment
        tensors: list[GgufTensor] = []
        expected = 0
        for name, shape, kind, offset in infos:
            tensor = self.tensor(data, name, shape, kind, offset)
            if offset != expected:
                raise _Malformed(
                    f"tensor {name!r} is at offset {offset}, but the one before it ends at {expected}, aligned"
                )
            expected = -(-(tensor.stop - data) // alignment) * alignment
            tensors.append(tensor)
        return tensors

    def u32(self) -> int:
        (value,) = _U32.unpack_from(self.mapped, self.at)
        self.at += 4
        return int(value)

    def u64(self) -> int:
        (value,) = _U64.unpack_from(self.mapped, self.at)
        self.at += 8
        return int(value)

    def count(self, smallest: int, limit: int) -> int:
        """Read a count of items that take at least `smallest` bytes each."""
        count = self.u64()
        if count * smallest > self.size - self.at:
            raise _Malformed(f"a count of {count} does not fit in the file")
        if count > limit:
            raise _Malformed(f"a count of {count} exceeds the limit of {limit}")
        return count

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        mapped, unpack, at, size = self.mapped, _U64.unpack_from, self.at, self.size  # local names are faster
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
        count = self.count(smallest=8 if kind == _STRING else 1, limit=_MAX_ARRAY_VALUES - self.array_values)
        self.array_values += count
        return self.strings(count) if kind == _STRING else self.scalars(kind, count)

    def scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise _Malformed(f"value type {kind} is unknown")
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
        format = GGML_TYPES.get(kind)
        if format is None:
            supported = ", ".join(format.name for format in GGML_TYPES.values())
            raise UnsupportedModel(
                f"tensor {shortened(repr(name))} is stored as {_type_name(kind)}; supported are {supported}"
            )
        elements = math.prod(shape)
        start = data + offset
        stop = start + elements // format.values * format.nbytes
        if elements == 0 or shape[-1] % format.values or stop > len(self.mapped):
            raise _Malformed(f"tensor {name!r} of shape {list(shape)} does not fit in the file")
        return GgufTensor(name, shape, format.name, start, stop)


def _type_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType(kind).name if kind in set(GGMLQuantizationType) else f"unknown GGML type {kind}"

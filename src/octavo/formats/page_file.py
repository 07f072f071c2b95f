"""Files of KV pages. The disk tier writes files of one page; a saved KV state has many pages and their tokens.

    64 bytes    magic, version, offset, length and checksum of the header; zeros
    pages       page_bytes each
    header      MessagePack, see Header

The header comes last, so that pages can be written one at a time. A file gets its name when it is complete. Loss or
damage after that, for instance in a power failure, is detected by checksums (XXH3, 128 bits).
"""

import os
import secrets
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from xxhash import xxh3_128_digest

_MAGIC, _VERSION = b"OctavoKV", 1
_PREAMBLE = struct.Struct("<8sIQQ16s")
_START = 64  # offset of the first page
_MAX_HEADER = 2**26  # bytes; millions of tokens
TEMPORARY = r"\.[0-9a-f]{16}\.tmp"  # suffix of a file's name until it is complete


class BadPageFile(ValueError):
    """The file is not a page file, is damaged, or has another version of the format."""


class Header(msgspec.Struct, frozen=True):
    """What a page file contains.

    Attributes:
        page_bytes: size of each page.
        keys: the keys of the pages, in the order of the file.
        checksums: XXH3 of each page, 16 bytes.
        fingerprint, tokens, metadata: as passed to `write_page_file`.
    """

    page_bytes: int
    keys: list[bytes]
    checksums: list[bytes]
    fingerprint: str = ""
    tokens: list[int] = []
    metadata: dict[str, str] = {}


def write_page_file(
    path: Path,
    page_bytes: int,
    pages: Iterable[tuple[bytes, np.ndarray]],
    *,
    fingerprint: str = "",
    tokens: Sequence[int] = (),
    metadata: Mapping[str, str] | None = None,
    durable: bool = False,
) -> None:
    """Write pages to `path`, completely or not at all. Only the owner can read the file.

    Args:
        pages: key and content (uint8 [page_bytes]) of each page.
        fingerprint, tokens, metadata: stored unchanged.
        durable: whether to wait until the file would survive a power failure.

    Raises:
        OSError
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    keys, checksums = [], []
    try:
        with open(temporary, "xb", opener=_private) as file:
            file.seek(_START)
            for key, content in pages:
                if content.shape != (page_bytes,) or content.dtype != np.uint8:
                    raise ValueError(f"a page must have {page_bytes} bytes")
                keys.append(key)
                checksums.append(xxh3_128_digest(content.data))
                file.write(content.data)
            header = Header(page_bytes, keys, checksums, fingerprint, list(tokens), dict(metadata or {}))
            file.write(encoded := msgspec.msgpack.encode(header))
            file.seek(0)
            start = _START + len(keys) * page_bytes
            file.write(_PREAMBLE.pack(_MAGIC, _VERSION, start, len(encoded), xxh3_128_digest(encoded)))
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def page_file_bytes(page_bytes: int) -> int:
    """Return the size of a file of one page with a key of 16 bytes."""
    header = Header(page_bytes, [bytes(16)], [bytes(16)])
    return _START + page_bytes + len(msgspec.msgpack.encode(header))


class PageFile:
    """A page file open for reading. Thread-safe. Raises OSError or BadPageFile."""

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0, opener=_without_blocking)  # noqa: SIM115
        try:
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._index = {key: i for i, key in enumerate(self.header.keys)}

    def __enter__(self) -> "PageFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def read(self, key: bytes) -> np.ndarray:
        """Return the content of a page, uint8 [page_bytes]. Raises OSError; BadPageFile if it is missing or damaged."""
        if (index := self._index.get(key)) is None:
            raise BadPageFile("it does not have this page")
        content = np.empty(self.header.page_bytes, np.uint8)
        if os.preadv(self._file.fileno(), [content.data], _START + index * content.nbytes) < content.nbytes:
            raise BadPageFile("it is incomplete")  # the memory may happen to hold this very page from an earlier read
        if xxh3_128_digest(content.data) != self.header.checksums[index]:
            raise BadPageFile("one of its pages is damaged")
        return content

    def close(self) -> None:
        self._file.close()

    def _read_header(self) -> Header:
        descriptor = self._file.fileno()
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadPageFile("it is not a regular file")
        preamble = os.pread(descriptor, _PREAMBLE.size, 0)
        if len(preamble) < _PREAMBLE.size or not preamble.startswith(_MAGIC):
            raise BadPageFile("it is not a file of KV pages")
        _, version, start, length, checksum = _PREAMBLE.unpack(preamble)
        if version != _VERSION:
            raise BadPageFile(f"it has format {version}, but this version of Octavo reads format {_VERSION}")
        if start + length != status.st_size:
            raise BadPageFile("it is incomplete")
        if length > _MAX_HEADER:
            raise BadPageFile("its header is too long")
        encoded = os.pread(descriptor, length, start)
        if xxh3_128_digest(encoded) != checksum:
            raise BadPageFile("its header is damaged")
        try:
            header = msgspec.msgpack.decode(encoded, type=Header)
        except msgspec.DecodeError:
            raise BadPageFile("its header is damaged") from None
        if len(header.keys) != len(header.checksums) or start != _START + len(header.keys) * header.page_bytes:
            raise BadPageFile("its header is damaged")
        return header


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _without_blocking(path: str, flags: int) -> int:
    """Open a file without blocking on a named pipe that has no writer. Pipes are refused afterwards."""
    return os.open(path, flags | os.O_NONBLOCK)

"""Encrypted files of KV states: page files whose pages, tokens and metadata are sealed, see formats/page_cipher.py."""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from octavo.formats.page_cipher import OVERHEAD, PageCipher
from octavo.formats.page_file import BadPageFile, Header, PageFile

from .file import SEALED

_BOUND = b"octavo kv state"


class _Content(msgspec.Struct, frozen=True):
    """What is known of a state; see Header."""

    fingerprint: str
    tokens: list[int]
    metadata: dict[str, str]


def sealed_state(
    cipher: PageCipher,
    page_bytes: int,
    pages: Iterable[tuple[bytes, np.ndarray]],
    fingerprint: str,
    tokens: Sequence[int],
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    """Return the arguments of write_page_file for the encryption of a state, whose pages are encrypted as they come."""
    content = msgspec.msgpack.encode(_Content(fingerprint, list(tokens), dict(metadata)))
    return {
        "page_bytes": page_bytes + OVERHEAD,
        "pages": _sealed(cipher, pages),
        "metadata": {SEALED: b64encode(cipher.seal(content, _BOUND)).decode()},
    }


class EncryptedPageFile:
    """A sealed page file, read as a PageFile.

    Raises:
        OSError, BadPageFile
        Tampered: It was changed, or it is encrypted with another key.
    """

    def __init__(self, path: Path, cipher: PageCipher):
        self._cipher, self._file = cipher, PageFile(path)
        try:
            self.header = self._open_header()
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, key: bytes) -> bool:
        return self._cipher.name(key) in self._file

    def read(self, key: bytes) -> np.ndarray:
        sealed = self._file.read(self._cipher.name(key))
        return np.frombuffer(self._cipher.open(sealed.data, key), np.uint8)

    def verify(self, keys: Iterable[bytes]) -> None:
        """Read all pages. `keys` are those that the file may have."""
        found = [key for key in keys if key in self]
        if len(found) != len(self.header.keys):
            raise BadPageFile("it has pages of something else")
        for key in found:
            self.read(key)

    def close(self) -> None:
        self._file.close()

    def _open_header(self) -> Header:
        header = self._file.header
        if SEALED not in header.metadata:
            raise BadPageFile("it is not encrypted, but this server has a kv_key")
        try:
            sealed = b64decode(header.metadata[SEALED], validate=True)
        except ValueError:
            raise BadPageFile("its header is damaged") from None
        content = msgspec.msgpack.decode(self._cipher.open(sealed, _BOUND), type=_Content)
        page_bytes = header.page_bytes - OVERHEAD
        return Header(page_bytes, header.keys, header.checksums, content.fingerprint, content.tokens, content.metadata)


def _sealed(cipher: PageCipher, pages: Iterable[tuple[bytes, np.ndarray]]) -> Iterator[tuple[bytes, np.ndarray]]:
    for key, content in pages:
        yield cipher.name(key), np.frombuffer(cipher.seal(content.data, key), np.uint8)

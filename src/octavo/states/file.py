"""Saved KV states: page files with a state's tokens and the pages that were available when it was saved."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octavo.errors import ConfigError, InvalidKVState
from octavo.formats.page_file import BadPageFile, PageFile, write_page_file
from octavo.kv import Prefix, root_key
from octavo.kv.prefix import origin_root

if TYPE_CHECKING:
    from octavo.formats.page_cipher import PageCipher

    from .encrypted_file import EncryptedPageFile

SEALED = "sealed"  # the only metadata of an encrypted file that is not encrypted: the encrypted rest


def save_state(
    path: Path,
    *,
    tokens: Sequence[int],
    fingerprint: str,
    metadata: Mapping[str, str],
    page_bytes: int,
    pages: Iterable[tuple[bytes, np.ndarray]],
    cipher: "PageCipher | None" = None,
) -> None:
    """Write a state to a file, completely or not at all.

    Args:
        pages: key and content, uint8 [page_bytes], of each page, consumed one at a time. Missing pages are recomputed
            when the state is continued. Keys are those of sequences without an origin; see `root_key`.
        cipher: Encrypts the pages, the tokens and all else that is known of the state; None: nothing is encrypted.

    Raises:
        OSError
    """
    if cipher is None:
        write_page_file(
            path, page_bytes, pages, fingerprint=fingerprint, tokens=tokens, metadata=metadata, durable=True
        )
        return
    from .encrypted_file import sealed_state

    sealed = sealed_state(cipher, page_bytes, pages, fingerprint, tokens, metadata)
    write_page_file(path, **sealed, durable=True)


class StateFile:
    """The pages of a saved state: a read-only Tier, only for sequences that continue the loaded state.

    Checksums find accidental damage but not forged pages, with which the file's author could control a model's output.
    So the pages are found only under keys with this `origin`, and only if the file's own keys follow from its tokens.

    Args:
        origin: the id of the loaded state.
        page_size: tokens per page.
        page_bytes: size of a page in this engine.
        cipher: opens an encrypted file, all of whose pages are then checked.

    Raises:
        InvalidKVState: the file cannot be read, was changed, or its pages are not of this engine's size.
    """

    name = "state"
    refused = 0

    def __init__(self, path: Path, origin: str, page_size: int, page_bytes: int, cipher: "PageCipher | None" = None):
        self._file = _open(path, cipher)
        header = self._file.header
        try:
            if header.page_bytes != page_bytes:
                raise ValueError
            tokens, root = array("i", header.tokens), bytes.fromhex(header.metadata.get("root", ""))
            saved, loaded = (Prefix(first, tokens, page_size) for first in (root, origin_root(root, origin)))
            pages = [(loaded.key(i), saved.key(i)) for i in range(len(tokens) // page_size)]
            if not isinstance(self._file, PageFile):
                self._file.verify(key for _, key in pages)
        except (ValueError, OverflowError):
            self._file.close()
            raise InvalidKVState(
                f"{path} is not a usable KV state: it is inconsistent or was changed; save it again"
            ) from None
        self._saved_key = {key: saved_key for key, saved_key in pages if saved_key in self._file}

    def __contains__(self, key: bytes) -> bool:
        return key in self._saved_key

    def read(self, key: bytes) -> np.ndarray | None:
        try:
            return self._file.read(self._saved_key[key])
        except (OSError, ValueError, KeyError):  # ValueError also after `close`
            self._saved_key.pop(key, None)
            return None

    def write(self, key: bytes, content: np.ndarray) -> bool:
        return False

    def touch(self, key: bytes) -> bool:
        return key in self

    def close(self) -> None:
        self._file.close()


def read_saved_tokens(
    path: Path, fingerprint: str, vocab_size: int, tenant: str, salt: str, cipher: "PageCipher | None" = None
) -> list[int]:
    """Return the tokens of a saved state. Raises InvalidKVState unless it fits this engine, tenant and salt."""
    file = _open(path, cipher)
    header = file.header
    file.close()
    if header.fingerprint != fingerprint:
        raise InvalidKVState(
            f"{path} belongs to another model, quantization or layout of the KV cache, or machine type"
        )
    if header.metadata.get("root") != root_key(fingerprint, tenant, salt).hex():
        raise InvalidKVState(f"{path} is of another tenant or cache_salt; use those that it was saved with")
    if not header.tokens or not all(0 <= token < vocab_size for token in header.tokens):
        raise InvalidKVState(f"{path} is not a usable KV state: it has tokens beyond this model's vocabulary")
    return header.tokens


def page_cipher(key: str | None) -> "PageCipher | None":
    """Return the cipher of the setting kv_key; None if it is not set. Raises ConfigError."""
    if key is None:
        return None
    try:
        from octavo.formats.page_cipher import PageCipher
    except ImportError:
        raise ConfigError("kv_key needs cryptography: pip install 'octavo[secrets]'") from None
    return PageCipher(key)


def _open(path: Path, cipher: "PageCipher | None") -> "PageFile | EncryptedPageFile":
    """Open a state's file. Raises InvalidKVState."""
    try:
        if cipher is not None:
            from .encrypted_file import EncryptedPageFile

            return EncryptedPageFile(path, cipher)
        file = PageFile(path)
        if SEALED in file.header.metadata:
            file.close()
            raise BadPageFile("it is encrypted, and this server has no kv_key")
        return file
    except OSError as error:
        raise InvalidKVState(
            f"cannot read the KV state {path} ({error.strerror}); give a file that was saved"
        ) from None
    except ValueError as error:  # BadPageFile, or Tampered
        raise InvalidKVState(f"{path} is not a usable KV state: {error}; save it again") from None

"""A KV state saved to a file: its tokens, and what pages of them were at hand."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from octavo.errors import InvalidKVState
from octavo.formats.page_file import BadPageFile, PageFile, write_page_file
from octavo.kv import root_key


def save_state(
    path: Path,
    *,
    tokens: Sequence[int],
    fingerprint: str,
    metadata: Mapping[str, str],
    page_bytes: int,
    pages: Iterable[tuple[bytes, np.ndarray]],
) -> None:
    """Write a state, all or nothing. Pages (key, uint8 [page_bytes]) are asked for one at a time.

    Pages may be missing: they are computed when the state is continued. Raises OSError.
    """
    write_page_file(path, page_bytes, pages, fingerprint=fingerprint, tokens=tokens, metadata=metadata, durable=True)


class StateFile:
    """A saved state, and a Tier of its pages that cannot be written. Raises InvalidKVState if it cannot be read.

    Checksums find accidents, not intent: whoever wrote the file decides what a model with these pages will say.
    """

    name = "state"

    def __init__(self, path: Path):
        try:
            self._file = PageFile(path)
        except OSError as error:
            raise InvalidKVState(
                f"cannot read the KV state {path} ({error.strerror}); give a file that was saved"
            ) from None
        except BadPageFile as error:
            raise InvalidKVState(f"{path} is no usable KV state: {error}; save it again") from None
        header = self._file.header
        self.tokens, self.fingerprint, self.metadata = header.tokens, header.fingerprint, header.metadata
        self.page_bytes, self.keys = header.page_bytes, header.keys
        self._lost: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._file and key not in self._lost

    def read(self, key: bytes) -> np.ndarray | None:
        try:
            return self._file.read(key)
        except (OSError, ValueError):  # the latter also if it has been closed
            self._lost.add(key)
            return None

    def write(self, key: bytes, content: np.ndarray) -> bool:
        return False

    def touch(self, key: bytes) -> bool:
        return key in self

    def close(self) -> None:
        self._file.close()


def read_saved_tokens(path: Path, fingerprint: str, vocab_size: int, tenant: str, salt: str) -> list[int]:
    """Return the tokens of a saved state. Raises InvalidKVState unless it fits this engine, tenant and salt."""
    file = StateFile(path)
    file.close()
    if file.fingerprint != fingerprint:
        raise InvalidKVState(f"{path} is of another model, quantization or layout of the KV cache, or machine")
    if file.metadata.get("root") != root_key(fingerprint, tenant, salt).hex():
        raise InvalidKVState(f"{path} is of another tenant or cache_salt: name those that it was saved with")
    if not file.tokens or not all(0 <= token < vocab_size for token in file.tokens):
        raise InvalidKVState(f"{path} is no usable KV state: it has tokens that this model has not")
    return file.tokens

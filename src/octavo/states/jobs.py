"""The engine's part in saving and loading KV states: file I/O in threads while the engine runs steps."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octavo.backends.base import Backend
from octavo.errors import RequestFailed
from octavo.kv import KVCache, Prefix
from octavo.kv.transfers import Transfers
from octavo.states.file import StateFile, save_state

if TYPE_CHECKING:
    from octavo.formats.page_cipher import PageCipher


class StateFiles:
    """Saves and loads states in the threads of `transfers`. Its methods return at once; call them from one thread."""

    def __init__(self, kv: KVCache, backend: Backend, transfers: Transfers, cipher: "PageCipher | None" = None):
        self._kv, self._backend, self._transfers, self._cipher = kv, backend, transfers, cipher
        self._saves: list[tuple[Future[None], list[int]]] = []  # with the pages acquired for it
        self._files: dict[str, Future[StateFile]] = {}  # by the state's id

    def save(self, path: Path, prefix: Prefix, saved: Prefix, fingerprint: str) -> "Future[None]":
        """Write the tokens of a state and those of its full pages that are available.

        Args:
            prefix: the state's tokens, with the keys of its pages in the pool and the tiers.
            saved: the same tokens, with the keys of its pages in the file.

        Returns:
            A future that raises RequestFailed if the file cannot be written.
        """
        sources: list[
            tuple[bytes, bytes, int | None]
        ] = []  # key in the file, key here, page (None if only a tier has it)
        for i in range(len(prefix.tokens) // self._kv.page_size):
            key = prefix.key(i)
            page = self._kv.pool.find(key)
            if page is not None:
                self._kv.pool.acquire(page)
            elif self._transfers.tier_of(key) is None:
                break
            sources.append((saved.key(i), key, page))

        def write() -> None:
            try:
                save_state(
                    path,
                    tokens=prefix.tokens.tolist(),
                    fingerprint=fingerprint,
                    metadata={"root": saved.parent(0).hex()},
                    page_bytes=self._backend.page_bytes,
                    pages=self._contents(sources),
                    cipher=self._cipher,
                )
            except OSError as error:
                raise RequestFailed(f"cannot write the KV state {path} ({error.strerror or error})") from None

        future = self._transfers.run(write)
        self._saves.append((future, [page for _, _, page in sources if page is not None]))
        return future

    def end_saves(self) -> None:
        """Release the pages acquired for saves that have ended."""
        for future, pages in self._saves:
            if future.done():
                for page in reversed(pages):
                    self._kv.pool.release(page)
        self._saves = [save for save in self._saves if not save[0].done()]

    def load(self, id: str, path: Path) -> "Future[StateFile]":
        """Open a state's file, so that sequences whose origin is `id` find pages in it until `close`.

        Returns:
            A future that is done when the file is open; it raises InvalidKVState.
        """

        def open_file() -> StateFile:
            file = StateFile(path, id, self._kv.page_size, self._backend.page_bytes, self._cipher)
            self._transfers.add_tier(file)
            return file

        self._files[id] = future = self._transfers.run(open_file)
        return future

    def close(self, id: str) -> None:
        """Close the file of state `id`, if `load` opened one."""
        if future := self._files.pop(id, None):
            future.add_done_callback(self._close)

    def _close(self, future: "Future[StateFile]") -> None:
        if not future.cancelled() and future.exception() is None:
            self._transfers.remove_tier(future.result())
            future.result().close()

    def _contents(self, sources: list[tuple[bytes, bytes, int | None]]) -> Iterator[tuple[bytes, np.ndarray]]:
        for saved_key, key, page in sources:
            if page is not None:
                yield saved_key, self._backend.export_page(page)
            elif (tier := self._transfers.tier_of(key)) and (content := tier.read(key)) is not None:
                yield saved_key, content

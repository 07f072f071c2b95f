"""KV states in files: written while the engine goes on, and read from as one more tier."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from octavo.backends.base import Backend
from octavo.errors import RequestFailed
from octavo.kv import KVCache, Prefix
from octavo.kv.transfers import Transfers
from octavo.states.file import StateFile, save_state


class StateFiles:
    """All calls come from the engine's thread and return at once: files are the business of `transfers`' threads."""

    def __init__(self, kv: KVCache, backend: Backend, transfers: Transfers):
        self._kv, self._backend, self._transfers = kv, backend, transfers
        self._saves: list[tuple[Future[None], list[int]]] = []  # with the pages that are held for it
        self._files: dict[str, Future[StateFile]] = {}  # by the state's id

    def save(self, path: Path, prefix: Prefix, fingerprint: str, metadata: dict[str, str]) -> "Future[None]":
        """Write the tokens of `prefix` and what there is of its full pages. The future raises RequestFailed."""
        sources: list[tuple[bytes, int | None]] = []  # no page: a tier has it
        for i in range(len(prefix.tokens) // self._kv.page_size):
            key = prefix.key(i)
            page = self._kv.pool.find(key)
            if page is not None:
                self._kv.pool.hold(page)
            elif self._transfers.holds(key) is None:
                break
            sources.append((key, page))

        def write() -> None:
            try:
                save_state(
                    path,
                    tokens=prefix.tokens.tolist(),
                    fingerprint=fingerprint,
                    metadata=metadata,
                    page_bytes=self._backend.page_bytes,
                    pages=self._contents(sources),
                )
            except OSError as error:
                raise RequestFailed(f"cannot write the KV state {path} ({error.strerror or error})") from None

        future = self._transfers.run(write)
        self._saves.append((future, [page for _, page in sources if page is not None]))
        return future

    def end_saves(self) -> None:
        """Let go of the pages of saves that have ended."""
        for future, pages in self._saves:
            if future.done():
                for page in reversed(pages):
                    self._kv.pool.release(page)
        self._saves = [save for save in self._saves if not save[0].done()]

    def load(self, id: str, path: Path) -> "Future[StateFile]":
        """Find pages in a state's file, from when the future is done until `forget`. It raises InvalidKVState."""

        def open_file() -> StateFile:
            file = StateFile(path)
            self._transfers.add_tier(file)
            return file

        self._files[id] = future = self._transfers.run(open_file)
        return future

    def forget(self, id: str) -> None:
        if future := self._files.pop(id, None):
            future.add_done_callback(self._close)

    def _close(self, future: "Future[StateFile]") -> None:
        if not future.cancelled() and future.exception() is None:
            self._transfers.remove_tier(future.result())
            future.result().close()

    def _contents(self, sources: list[tuple[bytes, int | None]]) -> Iterator[tuple[bytes, np.ndarray]]:
        for key, page in sources:
            if page is not None:
                yield key, self._backend.export_page(page)
            elif (tier := self._transfers.holds(key)) and (content := tier.read(key)) is not None:
                yield key, content

"""A backend that computes steps late, in a thread: what a GPU is for the engine, with any backend's results."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np

from octavo.backends.base import StepBatch, StepResult
from octavo.engine.engine import Engine

LATEST = 0.001  # seconds


class LateBackend:
    """A Backend (see octavo.backends.base) over another: steps and copies are done in order by one thread.

    Pages move at once, as the engine promises that no step needs them. Who has got the other backend already, and moves
    its pages, waits for the copies too.

    Attributes:
        unread: the launched steps whose results have not been read.
        most_unread: the most that there have been at a time.
    """

    runs_ahead = True

    def __init__(self, backend: Any):
        self.unread = self.most_unread = 0
        self._backend, self._random = backend, random.Random(0)
        self._thread = ThreadPoolExecutor(1, "late backend")
        self._kept: dict[int, int] = {}
        self._copied: Future[Any] = self._thread.submit(int)
        self._export, self._import = backend.export_page, backend.import_page
        backend.export_page, backend.import_page = self.export_page, self.import_page

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def launch(self, batch: StepBatch) -> "LateStep":
        assert self.unread < 2, "at most one earlier step may be without a result"
        self.unread += 1
        self.most_unread = max(self.most_unread, self.unread)
        return LateStep(self, self._thread.submit(self._compute, batch))

    def step(self, batch: StepBatch) -> StepResult:
        return self.launch(batch).result()

    def logits(self, batch: StepBatch) -> np.ndarray:
        logits: np.ndarray = self._thread.submit(self._backend.logits, batch).result()
        return logits

    def export_page(self, page: int) -> np.ndarray:
        self._copied.result()
        content: np.ndarray = self._export(page)
        return content

    def import_page(self, page: int, content: np.ndarray) -> None:
        self._copied.result()
        self._import(page, content)

    def copy_page(self, source: int, target: int) -> None:
        self._copied = self._thread.submit(self._backend.copy_page, source, target)

    def close(self) -> None:
        self._thread.shutdown()
        self._backend.close()

    def _compute(self, batch: StepBatch) -> StepResult:
        time.sleep(self._random.uniform(0, LATEST))
        tokens = [max(self._kept[-1 - token], 0) if token < 0 else token for token in batch.tokens.tolist()]
        result: StepResult = self._backend.step(replace(batch, tokens=np.array(tokens, np.int32)))
        assert batch.places is not None
        self._kept.update(zip(batch.places.tolist(), result.tokens.tolist(), strict=True))
        return result


@dataclass
class LateStep:
    """A step that is computed in a thread."""

    backend: LateBackend
    computed: Future[StepResult]

    def result(self) -> StepResult:
        self.backend.unread -= 1
        return self.computed.result()


@contextmanager
def late_engines() -> Iterator[list[LateBackend]]:
    """Give every engine that this process makes a LateBackend, unless it has one. Return these, as they are made."""
    make, made = Engine.__init__, list[LateBackend]()

    def make_late(self: Engine, backend: Any, **settings: Any) -> None:
        made.append(backend if isinstance(backend, LateBackend) else LateBackend(backend))
        make(self, made[-1], **settings)

    with patch.object(Engine, "__init__", make_late):
        yield made

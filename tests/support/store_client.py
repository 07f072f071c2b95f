"""An engine that shares pages through a store or directly, whose model is arithmetic.

So a request takes as long as it waits for the store, but for the time in which the machine lets the process wait.
"""

import contextlib
import random
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from octavo.backends.base import StepBatch, StepResult
from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest, PageSource, TokenOutput
from octavo.formats.page_cipher import PageCipher
from octavo.kv import Transfers
from octavo.kv.peers.access import PeerAccess
from octavo.kv.store import Store
from octavo.kv.store.sharing import Sharing
from octavo.params import SamplingParams
from prefix_backend import PrefixBackend, complete

PAGE = 4
PROMPT = random.Random(7).choices(range(3), k=41)  # ten full pages
FULL = 40
STALL = 0.1  # seconds that a request may wait for a store in all


def seconds_not_idle() -> float:
    """For how long threads of this process have run, or were ready to and did not, as the machine was busy.

    Added up over threads, without which a busy machine and the collection of garbage would look like a slow store.
    """
    total = 0
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            total += sum(map(int, (thread / "schedstat").read_text().split()[:2]))
    return total / 1e9


class SlowBackend(PrefixBackend):
    """A PrefixBackend whose steps take `slowness` seconds more."""

    slowness = 0.0

    def step(self, batch: StepBatch) -> StepResult:
        time.sleep(self.slowness)
        return super().step(batch)


class StoreClient:
    """Asks an engine, and checks every answer."""

    def __init__(
        self,
        store: Store | None,
        fingerprint: str = "model",
        key: str | None = None,
        num_pages: int = 32,
        slowness: float = 0.0,
        access: PeerAccess | None = None,
    ):
        self.store = store
        backend = SlowBackend(num_pages, PAGE)
        backend.slowness = slowness
        transfers = Transfers(backend, ())
        self.sharing = Sharing(
            store,
            backend,
            fingerprint=fingerprint,
            ttl=100.0,
            cipher=PageCipher(key) if key else None,
            access=access,
            on_change=transfers.wake,
        )
        self.engine = Engine(
            backend,
            num_pages=num_pages,
            max_model_len=64,
            max_batch_size=8,
            max_batch_tokens=2 * PAGE if slowness else 64,
            transfers=transfers,
            sharing=self.sharing,
            fingerprint=fingerprint,
        )
        self.ids: Iterator[int] = count()
        self.longest = 0.0  # seconds that a request took; of a long one, those in which nothing ran or could run

    def ask(self, prompt: list[int] = PROMPT, source: PageSource | None = None, **terms: str) -> int:
        """Return how many tokens of the prompt were not computed."""
        busy, began = seconds_not_idle(), time.monotonic()
        params = SamplingParams(max_tokens=3)
        self.engine.add(EngineRequest(str(next(self.ids)), prompt, params, source=source, **terms))
        outputs: list[TokenOutput] = []
        while not outputs or outputs[-1].finish_reason is None:
            outputs += self.engine.step()
        seconds = time.monotonic() - began
        self.longest = max(self.longest, seconds - (seconds_not_idle() - busy) if seconds > STALL else seconds)
        assert [output.token for output in outputs] == complete(prompt, 3)
        return outputs[0].cached_tokens

    def settle(self) -> "StoreClient":
        """Wait until all pages that the store takes are written."""
        self.engine.kv.flush(10.0)
        return self

    def close(self) -> None:
        """Check that no page has leaked."""
        self.settle()
        stats = self.engine.stats()
        assert stats.free_pages + stats.cached_pages == stats.num_pages
        self.engine.close()

"""A store of KV pages in the memory of this process, which two engines share.

A class for --kv-store needs three methods. docs/kv_store.md says what they may do; this one forgets the oldest pages.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import ClassVar

from octavo import LLM, SamplingParams
from octavo.kv.store import Store

MAX_PAGES = 1000


class MemoryStore(Store):
    """Keeps the last MAX_PAGES pages in a dictionary, for all engines of the process. `ttl` is ignored."""

    lock = Lock()
    pages: ClassVar[OrderedDict[str, bytes]] = OrderedDict()

    def has(self, names: Sequence[str]) -> list[bool]:
        return [name in self.pages for name in names]

    def get(self, names: Sequence[str]) -> Iterator[bytes | None]:
        return map(self.pages.get, names)

    def set(self, name: str, value: memoryview, ttl: float) -> None:
        with self.lock:
            self.pages[name] = bytes(value)
            while len(self.pages) > MAX_PAGES:
                self.pages.popitem(last=False)


if __name__ == "__main__":
    prompt = "Octavo is a size of books. " * 20
    params = SamplingParams(temperature=0, max_tokens=8)
    for engine in "AB":
        with LLM("smollm2", kv_store="memory_store:MemoryStore", kv_cache_memory="100MiB") as llm:
            [answer] = llm.generate([prompt], params, use_tqdm=False)
        print(f"engine {engine} found {answer.metrics.cached_tokens} of {len(answer.prompt_token_ids)} tokens")

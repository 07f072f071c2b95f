"""The time to choose one of 64 replicas that have a million pages: python benchmarks/route_choice.py

The time of a choice includes that to compute keys of the prompt's pages, as in the frontend, and without.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from octavo.frontend.router import Load, Router
from octavo.kv import page_keys, root_key
from octavo.kv.prefix import KEY_BYTES

REPLICAS, PAGES, PAGE_SIZE = 64, 1_000_000, 32
SYSTEM = 256  # tokens of the shared system prompt
PROMPTS, ROUNDS = 20, 2000
CACHED: dict[str, Callable[[int, int], int]] = {  # the pages of each prompt that replica i has, of so many
    "nothing": lambda i, pages: 0,
    "a system prompt, everywhere": lambda i, pages: SYSTEM // PAGE_SIZE,
    "all, everywhere": lambda i, pages: pages,
    "another part on each replica": lambda i, pages: i * pages // REPLICAS,
}


def prompt(number: int, length: int) -> list[int]:
    """Return the tokens of a prompt that begins with the system prompt."""
    return [7 * i % 50_000 for i in range(SYSTEM)] + [(number + i) * 2_654_435 % 50_000 for i in range(SYSTEM, length)]


def keys_of(tokens: Sequence[int]) -> Iterator[bytes]:
    return page_keys(root_key("fingerprint", "tenant", ""), tokens, PAGE_SIZE)


def replicas(router: Router, prompts: list[list[int]], cached: Callable[[int, int], int]) -> list[Load]:
    """Return replicas with a little load, pages of the prompts, and pages of others."""
    keys = [list(keys_of(tokens)) for tokens in prompts]
    loads = []
    for i in range(REPLICAS):
        load = router.new_replica()
        load.seconds_per_token = 0.001
        known = b"".join(key for of_prompt in keys for key in of_prompt[: cached(i, len(of_prompt))])
        assert load.publish(0, os.urandom(KEY_BYTES * (PAGES // REPLICAS)) + known, b"")
        load.add("a request", 10 * (i % 5), 1 + i % 3)
        loads.append(load)
    return loads


def microseconds(choose: Callable[[list[int]], object], prompts: list[list[int]]) -> tuple[float, float]:
    """Return the median and the least time of a choice."""
    times = []
    for i in range(ROUNDS):
        started = time.perf_counter()
        choose(prompts[i % PROMPTS])
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times), 1e6 * min(times)


def main() -> None:
    table = Table("tokens", "cached", "µs, median", "least", "with known keys, median", "least")
    for length in (512, 2048):
        prompts = [prompt(1000 * i, length) for i in range(PROMPTS)]
        for name, cached in CACHED.items():
            router = Router()
            loads = replicas(router, prompts, cached)

            def choose(tokens: list[int], router: Router = router, loads: list[Load] = loads) -> object:
                return router.choose(loads, len(tokens), keys_of(tokens), PAGE_SIZE)

            known = {id(tokens): list(keys_of(tokens)) for tokens in prompts}

            def only_choose(
                tokens: list[int],
                router: Router = router,
                loads: list[Load] = loads,
                known: dict[int, list[bytes]] = known,
            ) -> object:
                return router.choose(loads, len(tokens), known[id(tokens)], PAGE_SIZE)

            times = (*microseconds(choose, prompts), *microseconds(only_choose, prompts))
            table.add_row(f"{length:,}", name, *(f"{time:.0f}" for time in times))
    Console().print(table)


if __name__ == "__main__":
    main()

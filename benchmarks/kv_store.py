"""The gain from a shared KV store: python benchmarks/kv_store.py cold|wander|client [MODEL] [--store URL]

cold: time to first token of a long prompt on an engine that has never seen it, without a store and with one in which
another engine has written it. wander: conversations whose turns go to random ones of several engines, and the share of
what was computed before that is not computed again. client: pages of 0.3 to 4 MB to a Redis and back, by the client
of Octavo and by the package redis. Without --store, a redis-server is started for the run.
"""

import argparse
import contextlib
import random
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.table import Table

from octavo import LLM, SamplingParams
from octavo.kv.store.address import RedisAddress
from octavo.kv.store.resp import RespConnection

PROMPT = 4000  # tokens of the long prompt
SYSTEM, QUESTION, ANSWER = 512, 48, 32  # tokens of a conversation's beginning and of its turns


def random_tokens(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(length)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@contextlib.contextmanager
def redis_server(url: str | None) -> Iterator[str]:
    """Run a Redis that keeps nothing on disk, unless there is a URL already."""
    if url is not None:
        yield url
        return
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed; give --store URL")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def first_token(model: str, store: str | None) -> tuple[float, int, list[int]]:
    """Return the seconds to the first token of the long prompt on a new engine, its cached tokens, and an answer."""
    with LLM(model, kv_cache_memory="400MiB", kv_store=store) as llm:
        llm.generate([random_tokens(-1, 100)], greedy(2), use_tqdm=False)
        began = time.perf_counter()
        llm.generate([random_tokens(1, PROMPT)], greedy(1), use_tqdm=False)
        seconds = time.perf_counter() - began
        [output] = llm.generate([random_tokens(1, PROMPT)], greedy(16), use_tqdm=False)
        stats = llm.stats()
    return seconds, stats.cached_tokens - output.metrics.cached_tokens, output.outputs[0].token_ids


def cold(model: str, store: str) -> Table:
    table = Table("engine", "first token", "tokens from the store", title=f"A prompt of {PROMPT:,} tokens, {model}")
    alone, _, expected = first_token(model, None)
    table.add_row("without a store", f"{alone:.2f} s", "")
    writing, _, tokens = first_token(model, store)
    table.add_row("the first, which writes", f"{writing:.2f} s", "0")
    reading = [first_token(model, store) for _ in range(3)]
    for seconds, found, _ in reading:
        table.add_row("another, cold", f"{seconds:.2f} s ({seconds / alone:.1%})", f"{found:,}")
    assert all(each == expected for each in (tokens, *(run[2] for run in reading))), "the tokens differ"
    return table


def wander(model: str, store: str, engines: int, conversations: int, turns: int) -> Table:
    rng = random.Random(3)
    told = [random_tokens(0, SYSTEM) + random_tokens(10 + i, 64) for i in range(conversations)]
    known = [0] * conversations  # tokens of each conversation that were computed before
    table = Table(
        "turn", "computed before", "found", "share", title=f"{conversations} conversations over {engines} engines"
    )
    with contextlib.ExitStack() as stack:
        llms = [
            stack.enter_context(LLM(model, kv_cache_memory="120MiB", kv_store=store, threads=1, max_model_len=4096))
            for _ in range(engines)
        ]
        all_found = all_known = 0
        for turn in range(turns):
            placed: list[list[int]] = [[] for _ in llms]
            for i in rng.sample(range(conversations), conversations):
                placed[rng.randrange(engines)].append(i)
                told[i] += random_tokens(1000 * turn + i, QUESTION)

            def answer(engine: int, placed: list[list[int]] = placed) -> int:
                prompts = [told[i] for i in placed[engine]]
                outputs = llms[engine].generate(prompts, greedy(ANSWER), use_tqdm=False) if prompts else []
                for i, output in zip(placed[engine], outputs, strict=True):
                    told[i] = told[i] + output.outputs[0].token_ids
                return sum(output.metrics.cached_tokens for output in outputs)

            with ThreadPoolExecutor(engines) as pool:
                found = sum(pool.map(answer, range(engines)))
            before = sum(known)
            known = [len(each) for each in told]
            time.sleep(0.5)  # while people read, pages are written
            if turn:
                all_found, all_known = all_found + found, all_known + before
                table.add_row(str(turn + 1), f"{before:,}", f"{found:,}", f"{found / before:.1%}")
        table.add_row("all", f"{all_known:,}", f"{all_found:,}", f"{all_found / all_known:.1%}")
    return table


def client(url: str) -> Table:
    import redis

    address = RedisAddress.parse(url)
    own, package = RespConnection(address, 5.0, 2**28), redis.Redis.from_url(url)
    table = Table("page", "client", "SET", "MGET", "processor time of MGET", title="Batches of 8 pages")
    for size in (300_000, 737_280, 4_000_000):
        names = [f"page {i}".encode() for i in range(40_000_000 // size // 8 * 8 or 8)]
        value = memoryview(random.Random(0).randbytes(size))
        for name, write, read in (("Octavo", _own_set, _own_get), ("redis", _package_set, _package_get)):
            target = own if name == "Octavo" else package
            runs = [_measured(write, read, target, names, value) for _ in range(5)]
            written, fetched, processor = (statistics.median(column) for column in zip(*runs, strict=True))
            volume = size * len(names) / 1e6
            speeds = f"{volume / written:,.0f} MB/s", f"{volume / fetched:,.0f} MB/s"
            table.add_row(f"{size / 1e6:.2f} MB", name, *speeds, f"{1000 * processor / volume:.2f} s/GB")
        package.delete(*names)
    return table


def _measured(write: Callable, read: Callable, target: object, names: list[bytes], value: memoryview) -> list[float]:  # type: ignore[type-arg]
    began = time.perf_counter()
    for i in range(0, len(names), 8):
        write(target, names[i : i + 8], value)
    written = time.perf_counter()
    processor = time.process_time()
    for i in range(0, len(names), 8):
        read(target, names[i : i + 8])
    return [written - began, time.perf_counter() - written, time.process_time() - processor]


def _own_set(target: RespConnection, names: list[bytes], value: memoryview) -> None:
    for name in names:
        target.send_value([b"SET", name], value, [b"PX", b"60000"])
        target.reply()


def _own_get(target: RespConnection, names: list[bytes]) -> None:
    target.send([b"MGET", *names])
    for _ in range(target.array()):
        target.reply()


def _package_set(target, names, value) -> None:  # type: ignore[no-untyped-def]
    for name in names:
        target.set(name, value, px=60000)


def _package_get(target, names) -> None:  # type: ignore[no-untyped-def]
    target.mget(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["cold", "wander", "client"])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--store", help="URL of a Redis or Valkey")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--conversations", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    with redis_server(arguments.store) as store:
        if arguments.what == "cold":
            table = cold(arguments.model, store)
        elif arguments.what == "wander":
            table = wander(arguments.model, store, arguments.engines, arguments.conversations, arguments.turns)
        else:
            table = client(store)
    Console().print(table)


if __name__ == "__main__":
    main()

"""The gain from the prefix cache and its lower tiers: python benchmarks/hierarchy.py contexts|restart|dialogue [MODEL]

contexts: throughput of many conversations of two turns at once, on a pool that holds a tenth of them, with a disk tier,
compared with a pool that holds them all. restart: time to first token of a long prompt in an engine that has just
started, with the prompt on its disk and without. dialogue: time to first token of each turn, with the prefix cache and
without. Each run is a process of its own.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from octavo import LLM, KVState, SamplingParams

TURN = 16  # tokens that a user adds
Run = dict[str, Any]


def random_tokens(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(length)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def run_contexts(model: str, memory: int, disk: str | None, count: int, length: int, output: int) -> Run:
    """Run all first turns of `count` conversations, then all second turns; each has a KV state in between."""
    with LLM(model, kv_cache_memory=memory, kv_disk=disk, kv_cache_dtype="int8") as llm:
        llm.generate(random_tokens(-1, 64), greedy(8), use_tqdm=False)
        prompts = [random_tokens(i, length) for i in range(count)]
        states: list[KVState] = []
        tokens, seconds, found = [], [], 0
        for turn in range(2):
            started = time.perf_counter()
            outputs = llm.generate(prompts, greedy(output), use_tqdm=False, kv_cache_state=states[-count:] or None)
            seconds.append(time.perf_counter() - started)
            tokens.append([out.outputs[0].token_ids for out in outputs])
            found = sum(out.metrics.cached_tokens for out in outputs)
            states += [llm.get_kv_cache_state(out.request_id) for out in outputs]
            prompts = [random_tokens(count + i, TURN) for i in range(count)]
            print(f"turn {turn + 1}: {seconds[-1]:.1f} s", file=sys.stderr)
        for state in states:
            state.drop()
        llm.generate([1], greedy(1), use_tqdm=False)  # processed after the drops
        stats = llm.stats()
    return {
        "seconds": seconds,
        "tokens": tokens,
        "found": found,
        "pages": stats.num_pages,
        "leaked": stats.num_pages - stats.free_pages - stats.cached_pages,
        "preemptions": stats.preemptions,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run_first_token(model: str, disk: str | None, length: int) -> Run:
    with LLM(model, kv_disk=disk) as llm:
        llm.generate(random_tokens(-1, 64), greedy(8), use_tqdm=False)
        [out] = llm.generate(random_tokens(0, length), greedy(8), use_tqdm=False)
    return {"ttft": out.metrics.time_to_first_token, "tokens": out.outputs[0].token_ids}


def run_dialogue(model: str, caching: bool, turns: int, output: int) -> Run:
    with LLM(model, enable_prefix_caching=caching) as llm:
        prompt, ttft, tokens = random_tokens(-1, 64), [], []
        for turn in range(turns):
            prompt = [*prompt, *random_tokens(turn, 64)]
            [out] = llm.generate(prompt, greedy(output), use_tqdm=False)
            ttft.append(out.metrics.time_to_first_token)
            tokens.append(out.outputs[0].token_ids)
            prompt = [*prompt, *out.outputs[0].token_ids]
        return {"ttft": ttft, "tokens": tokens}


RUNS = {run.__name__: run for run in (run_contexts, run_first_token, run_dialogue)}


def apart(run: Any, *arguments: Any) -> Run:
    """Return the result of `run` in a process of its own."""
    command = [sys.executable, __file__, run.__name__, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{run.__name__} failed")
    result: Run = json.loads(done.stdout)
    return result


def contexts(arguments: argparse.Namespace) -> None:
    count, length, output = arguments.contexts, arguments.input_len, arguments.output_len
    with LLM(arguments.model, kv_cache_memory="256MiB", kv_cache_dtype="int8") as llm:
        page_bytes = 2**28 // llm.stats().num_pages
    memory = count * -(-(length + 2 * output + TURN) // 32) * page_bytes
    table = Table("pages", "tok/s", "turn 1, s", "turn 2, s", "found", "preempted", "leaked", "MB")
    table.title = "tok/s: output; found: tokens of turn 2's prompts that were not computed again"
    runs = []
    for share in (1, 10):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            disk = folder if share > 1 else None
            runs.append(run := apart(run_contexts, arguments.model, memory // share, disk, count, length, output))
        run["rate"] = 2 * count * output / sum(run["seconds"])
        figures = run["pages"], run["rate"], *run["seconds"], run["found"], run["preemptions"], run["leaked"]
        table.add_row(*(f"{figure:,.0f}" for figure in (*figures, run["memory"] / 1e6)))
    Console().print(table)
    same = runs[0]["tokens"] == runs[1]["tokens"]
    ratio = runs[1]["rate"] / runs[0]["rate"]
    print(f"throughput {ratio:.0%} of unconstrained, tokens {'equal' if same else 'DIFFER'}")


def restart(arguments: argparse.Namespace) -> None:
    cold, warm = [], []
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            cold.append(apart(run_first_token, arguments.model, folder, arguments.length))
            warm.append(apart(run_first_token, arguments.model, folder, arguments.length))
    assert all(run["tokens"] == cold[0]["tokens"] for run in cold + warm)
    before, after = (1e3 * statistics.median(run["ttft"] for run in runs) for runs in (cold, warm))
    print(f"{arguments.length} tokens: cold {before:.0f} ms, from disk {after:.0f} ms, {after / before:.1%}")


def dialogue(arguments: argparse.Namespace) -> None:
    ratios, last = [], []
    for _ in range(arguments.repeat):
        cached = apart(run_dialogue, arguments.model, True, arguments.turns, arguments.output_len)
        plain = apart(run_dialogue, arguments.model, False, arguments.turns, arguments.output_len)
        assert cached["tokens"] == plain["tokens"]
        last.append((cached["ttft"][-1], plain["ttft"][-1]))
        ratios.append(cached["ttft"][-1] / plain["ttft"][-1])
    cached_ms, plain_ms = (1e3 * statistics.median(times) for times in zip(*last, strict=True))
    print(f"turn {arguments.turns}: {cached_ms:.1f} ms, recomputing {plain_ms:.0f} ms, {statistics.median(ratios):.1%}")


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] in RUNS:
        print(json.dumps(RUNS[sys.argv[1]](*json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"contexts": contexts, "restart": restart, "dialogue": dialogue}
    parser.add_argument("what", choices=commands)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--contexts", type=int, default=2000)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--length", type=int, default=4000, help="of the prompt of `restart`")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the disk tier's folder is made")
    arguments = parser.parse_args()
    commands[arguments.what](arguments)


if __name__ == "__main__":
    main()

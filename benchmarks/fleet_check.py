"""The accuracy of a simulated fleet: python benchmarks/fleet_check.py

The same conversations come to a real fleet and to a simulated one. The real one is what `octavo serve
--data-parallel-size 4` has behind HTTP: frontend, router, and four engine processes with scheduler and KV cache. Only
the model is missing: each step sleeps for the time that a cost model gives, so that four engines fit on few cores.
"""

import argparse
import asyncio
import dataclasses
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from simulation_check import others_seconds
from sleeping_engine import FIRST_TOKEN, VOCABULARY, SleepingLLM

from octavo import AsyncLLM, SamplingParams
from octavo.config import EngineConfig
from octavo.outputs import RequestOutput
from octavo.simulation import CostModel
from octavo.simulation.conversations import Conversations
from octavo.simulation.fleet.fleet import Fleet
from octavo.simulation.fleet.load import RecordedLoad
from octavo.simulation.trace import Arrivals, Prompts, TraceRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
ENGINES = 4
COSTS = CostModel(  # of steps of 100 ms and more: what other programs on the machine delay is little beside that
    settings={}, machine={}, page_size=32, page_bytes=1, num_pages=1500, max_model_len=4096,
    rows_ms=[(1, 96.0), (16, 104.0), (64, 144.0), (256, 360.0)], sampled_ms=[(1, 4.0), (64, 16.0)],
    kv_token_us=1.2, pair_us=0.2, step_ms=0.0, sequence_us=0.0, row_us=0.0,
)  # fmt: skip
LOADS = {"light": 1.2, "high": 15.0, "overloaded": 60.0}  # requests per second


def main() -> None:
    """Print a table of both fleets' figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of arrivals, for each load (default: %(default)s)")
    parser.add_argument("--loads", default=",".join(LOADS), help="(default: %(default)s)")
    args = parser.parse_args()
    table = Table("Load", "", "Real", "Simulated", "Off by")
    with tempfile.TemporaryDirectory() as folder:
        model, file = tiny_model(Path(folder) / "model"), Path(folder) / "costs.json"
        COSTS.save(file)
        config = EngineConfig(model=str(model), max_batch_size=16, max_batch_tokens=256, max_queue=10**6)
        for name in args.loads.split(","):
            trace = conversations(LOADS[name], args.seconds)
            before, began = others_seconds(), time.perf_counter()
            real = asyncio.run(serve(trace, dataclasses.replace(config, data_parallel_size=ENGINES), file))
            others = (others_seconds() - before) / (time.perf_counter() - began)
            add_rows(table, f"{name}: {LOADS[name]:g}/s\n({others:.1f} cores busy)", real, simulated(trace, config))
    Console().print(table)


def tiny_model(folder: Path) -> Path:
    """Return a folder with a tokenizer, and a model that nobody loads."""
    from tiny_models import CONFIGS, random_model, save_tokenizer

    random_model(CONFIGS["llama"]).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def conversations(rate: float, seconds: float) -> list[TraceRequest]:
    return Conversations(
        requests=round(rate * seconds), rate=rate, turns=4, think_time=4, input_len=64, output_len=32,
        system_prompts=8, system_len=256, skew=1.0, seed=1, max_len=3000,
    ).trace()  # fmt: skip


async def serve(trace: list[TraceRequest], config: EngineConfig, costs: Path) -> dict[str, float]:
    """Replay a trace in real time: each turn begins with the answers that the engines have given."""
    async with SleepingLLM.of(config, costs) as llm:
        began = time.time()
        outputs = await answers(llm, trace)
        seconds = time.time() - began
    metrics = [output.metrics for output in outputs]
    first = np.array([(each.first_token_time or 0.0) - each.arrival_time for each in metrics])
    tokens, prompts = (
        sum(request.output_tokens for request in trace),
        sum(len(each.prompt_token_ids) for each in outputs),
    )
    return figures(tokens / seconds, first, sum(each.cached_tokens for each in metrics) / prompts)


async def answers(llm: AsyncLLM, trace: list[TraceRequest]) -> list[RequestOutput]:
    """Send each request at its time. Return the outputs."""
    arrivals, prompts, histories = Arrivals(trace), Prompts(), dict[str | None, list[int]]()
    loop, changed, tasks = asyncio.get_running_loop(), asyncio.Event(), list[asyncio.Task[RequestOutput]]()
    start = loop.time()

    async def one(index: int) -> RequestOutput:
        request = trace[index]
        history = histories.get(request.conversation, [])
        tokens = history + ids(prompts.tokens(request)[len(history) :])
        params = SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True, detokenize=False)
        (output,) = await llm.generate(tokens, params)
        histories[request.conversation] = tokens + output.outputs[0].token_ids
        arrivals.ended(index, loop.time() - start)
        changed.set()
        return output

    while arrivals.next_at is not None or not all(task.done() for task in tasks):
        while arrivals.next_at is not None and arrivals.next_at <= loop.time() - start:
            tasks.append(loop.create_task(one(arrivals.pop()[1])))
        changed.clear()
        wait = None if arrivals.next_at is None else max(0.0, arrivals.next_at - loop.time() + start)
        with suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), wait)
        await asyncio.sleep(0)  # so that the task that has ended counts as done
    return [await task for task in tasks]


def ids(tokens: list[int]) -> list[int]:
    """Return the tokens of a simulated text as ids of the tiny model."""
    return [FIRST_TOKEN + (token >> 16) % VOCABULARY for token in tokens]


def simulated(trace: list[TraceRequest], config: EngineConfig) -> dict[str, float]:
    done = Fleet(config=config, costs=COSTS, pages=COSTS.num_pages, engines=ENGINES).simulate(RecordedLoad(trace))
    assert not done.problems, done.problems
    tokens = done.output.sum() / done.use.seconds
    return figures(tokens, done.time_to_first_token, done.cached.sum() / done.prompt.sum())


def figures(tokens: float, first: np.ndarray, hits: float) -> dict[str, float]:
    return {
        "output tokens/s": float(tokens),
        "first token, median (ms)": 1000 * float(np.median(first)),
        "first token, p95 (ms)": 1000 * float(np.percentile(first, 95)),
        "hit rate (%)": 100 * float(hits),
    }


def add_rows(table: Table, name: str, real: dict[str, float], modeled: dict[str, float]) -> None:
    cells = [
        "\n".join(real),
        *("\n".join(f"{value:,.1f}" for value in each.values()) for each in (real, modeled)),
        "\n".join(f"{modeled[key] / value - 1:+.1%}" for key, value in real.items()),
    ]
    table.add_row(name, *cells, end_section=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

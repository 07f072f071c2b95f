"""Routing between replicas, simulated and real, on one trace of conversations: python benchmarks/routing.py

The trace is replayed on one engine, and on four replicas with a quarter of its memory each: with Octavo's router, round
robin, and to the replica with the fewest requests. The model is a tiny one; its cost model is measured first. In the
simulation, the one engine is also four times as fast, so that it serves the same load; the real one is not, so only its
hit rate is comparable. Loads are those of the busiest replica relative to the mean.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from octavo import AsyncLLM, SamplingParams
from octavo.config import EngineConfig
from octavo.engine.loading import load_engine
from octavo.outputs import RequestOutput
from octavo.simulation import CostModel
from octavo.simulation.conversations import Conversations
from octavo.simulation.measure import measure
from octavo.simulation.placement import EXACT, ROUTINGS
from octavo.simulation.replay import simulate
from octavo.simulation.report import summarize
from octavo.simulation.trace import Arrivals, Prompts, TraceRequest, read_trace, write_trace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
REPLICAS = 4
FIRST_TOKEN, VOCABULARY = 3, 500  # ids in prompts: the tiny model's special tokens are the first ones


@dataclass(frozen=True)
class Result:
    """The figures of one replay; None where they were not measured."""

    hit_rate: float
    tokens: float | None = None  # computed by the busiest replica / mean
    busy: float | None = None  # time with a step running, likewise
    first_token: tuple[float, float] | None = None  # seconds: median and 95th percentile


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(model=str(tiny_model(Path(folder))), threads=1, max_batch_size=32, max_batch_tokens=256)
        costs = cost_model(config)
        config = replace(config, kv_cache_memory=args.pages * costs.page_bytes)
        headings = ("hit rate", "of one engine's", "tokens", "busy", "first token, ms")
        table = Table("requests/s", "routing", *(f"simulated: {heading}" for heading in headings))
        for heading in (*headings[:3], headings[4]) if args.real else ():
            table.add_column(f"real: {heading}")
        for rate in map(float, args.rates.split(",")):
            trace = read_trace(args.trace) if args.trace else conversations(rate, args)
            if args.write_trace:
                write_trace(args.write_trace, trace)
            simulated = {name: simulated_result(trace, config, costs, name) for name in (None, *ROUTINGS)}
            real = (
                {name: asyncio.run(real_result(trace, config, name)) for name in (None, *ROUTINGS)} if args.real else {}
            )
            for name in simulated:
                shown = [*cells(simulated[name], simulated[None]), *(cells(real[name], real[None]) if real else ())]
                table.add_row(f"{rate:g}", name or "one engine", *(cell for i, cell in enumerate(shown) if i != 8))
    Console(width=160).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="2,20", help="requests per second, comma-separated (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=600, help="in each trace (default: %(default)s)")
    parser.add_argument("--skew", type=float, default=1.0, help="of the system prompts' popularity (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pages", type=int, default=1000, help="of each replica (default: %(default)s)")
    parser.add_argument("--trace", type=Path, help="replay this file, as of octavo simulate, instead")
    parser.add_argument("--write-trace", type=Path, help="write the trace of the last rate to this file")
    parser.add_argument("--no-real", dest="real", action="store_false", help="simulate only")
    return parser.parse_args()


def conversations(rate: float, args: argparse.Namespace) -> list[TraceRequest]:
    return Conversations(
        requests=args.requests, rate=rate, turns=5, think_time=2, input_len=64, output_len=24,
        system_prompts=8, system_len=512, skew=args.skew, seed=args.seed, max_len=4000,
    ).trace()  # fmt: skip


def tiny_model(folder: Path) -> Path:
    from tiny_models import CONFIGS, random_model, save_tokenizer

    config = CONFIGS["llama"]
    config.max_position_embeddings = 4096
    random_model(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def cost_model(config: EngineConfig) -> CostModel:
    engine = load_engine(replace(config, kv_cache_memory=64 * 2**20), Path(config.model))
    try:
        return measure(engine, config)[0]
    finally:
        engine.close()


def simulated_result(trace: list[TraceRequest], config: EngineConfig, costs: CostModel, routing: str | None) -> Result:
    pages = (config.kv_cache_memory or 0) // costs.page_bytes
    if routing is None:
        one = replace(config, max_batch_size=config.max_batch_size * REPLICAS)
        summary = summarize(simulate(trace, one, faster(costs), pages * REPLICAS))
    else:
        several = replace(config, data_parallel_size=REPLICAS)
        summary = summarize(simulate(trace, several, costs, pages, routing=routing))
    assert not summary["failed"], summary["failed"]
    busiest, first = summary["busiest_to_mean"], summary["time_to_first_token_ms"]
    loads = (busiest["tokens_computed"], busiest["busy"]) if routing else (None, None)
    return Result(summary["prefix_hit_rate"], *loads, (first["p50"] / 1e3, first["p95"] / 1e3))


def faster(costs: CostModel) -> CostModel:
    """Return the costs of an engine that is REPLICAS times as fast."""
    curves = {
        name: [(count, ms / REPLICAS) for count, ms in getattr(costs, name)] for name in ("rows_ms", "sampled_ms")
    }
    rates = {
        name: getattr(costs, name) / REPLICAS for name in ("kv_token_us", "pair_us", "step_ms", "sequence_us", "row_us")
    }
    return msgspec.structs.replace(costs, **curves, **rates)


async def real_result(trace: list[TraceRequest], config: EngineConfig, routing: str | None) -> Result:
    """Replay a trace in real time: each turn begins with the answers that the model has given."""
    memory, replicas = config.kv_cache_memory or 0, REPLICAS if routing else 1
    config = replace(config, data_parallel_size=replicas, kv_cache_memory=memory * REPLICAS // replicas)
    async with AsyncLLM.from_config(config) as llm:
        if routing not in (None, EXACT):
            llm._frontend.placement.router = ROUTINGS[routing]()
        outputs = await serve(llm, trace)
        computed = [stats.engine.tokens_computed for stats in await llm.replica_stats() if stats.engine]
    metrics = [output.metrics for output in outputs]
    hits = sum(each.cached_tokens for each in metrics) / sum(len(output.prompt_token_ids) for output in outputs)
    first = sorted((each.first_token_time or 0.0) - each.arrival_time for each in metrics)
    tokens = max(computed) / statistics.mean(computed) if routing else None
    return Result(hits, tokens, None, (statistics.median(first), first[int(0.95 * len(first))]))


async def serve(llm: AsyncLLM, trace: list[TraceRequest]) -> list[RequestOutput]:
    arrivals, prompts, histories = Arrivals(trace), Prompts(), dict[str | None, list[int]]()
    loop, changed, running = asyncio.get_running_loop(), asyncio.Event(), set[asyncio.Task[RequestOutput]]()
    start, tasks = loop.time(), list[asyncio.Task[RequestOutput]]()

    async def one(index: int) -> RequestOutput:
        request = trace[index]
        history = histories.get(request.conversation, []) if request.conversation else []
        tokens = history + ids(prompts.tokens(request)[len(history) :])
        params = SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True)
        (output,) = await llm.generate(tokens, params)
        histories[request.conversation] = tokens + output.outputs[0].token_ids
        arrivals.ended(index, loop.time() - start)
        changed.set()
        return output

    while running or arrivals.next_at is not None:
        while arrivals.next_at is not None and arrivals.next_at <= loop.time() - start:
            task = loop.create_task(one(arrivals.pop()[1]))
            tasks.append(task)
            running.add(task)
            task.add_done_callback(running.discard)
        changed.clear()
        wait = None if arrivals.next_at is None else max(0.0, arrivals.next_at - loop.time() + start)
        with suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), wait)
        await asyncio.sleep(0)  # so that the task that has ended is discarded
    return [await task for task in tasks]


def ids(tokens: Iterable[int]) -> list[int]:
    """Return the tokens of a simulated text as ids of the tiny model."""
    return [FIRST_TOKEN + (token >> 16) % VOCABULARY for token in tokens]


def cells(result: Result, one_engine: Result) -> list[str]:
    loads = [f"{load:.2f}" if load is not None else "" for load in (result.tokens, result.busy)]
    first = " / ".join(f"{1e3 * seconds:.0f}" for seconds in result.first_token or ())
    return [f"{result.hit_rate:.1%}", f"{result.hit_rate / one_engine.hit_rate:.1%}", *loads, first]


if __name__ == "__main__":
    main()

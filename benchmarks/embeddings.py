"""The speed of embeddings against that of prompts that are generated from: python benchmarks/embeddings.py

Both compute the same prompts, by turns: embeddings pool the hidden states, generation samples one token.
"""

import statistics
import time

from rich.console import Console
from rich.table import Table

from octavo import LLM, PoolingParams, SamplingParams

TURNS = 3
SHAPES = [(32, 16), (4, 128), (1, 1024)]  # prompts, tokens of each


def main() -> None:
    """Measure and print a table."""
    table = Table("prompts", "tokens", "generated, tok/s", "last, ratio", "mean, ratio")
    with LLM("smollm2", enable_prefix_caching=False) as llm:
        for count, length in SHAPES:
            prompts = [[10 + (31 * i + 7 * k) % 40_000 for k in range(length)] for i in range(count)]
            ways = {
                "generated": lambda prompts=prompts: llm.generate(
                    prompts, SamplingParams(max_tokens=1), use_tqdm=False
                ),
                "last": lambda prompts=prompts: llm.encode(prompts, use_tqdm=False),
                "mean": lambda prompts=prompts: llm.encode(prompts, PoolingParams(pooling="mean"), use_tqdm=False),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(1 + TURNS):  # the first turn touches the memory for the first time
                for name, run in ways.items():
                    started = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - started)
            best = {name: statistics.median(times[1:]) for name, times in seconds.items()}
            ratios = (f"{best['generated'] / best[name]:.2f}" for name in ("last", "mean"))
            table.add_row(str(count), str(length), f"{count * length / best['generated']:,.0f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()

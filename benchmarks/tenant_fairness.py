"""What a flood of one tenant costs another on a real server with API keys: python benchmarks/tenant_fairness.py

A quiet tenant keeps a few streams running: alone; beside a tenant that keeps as many running, so that each has half the
batch (an equal share); and beside one that keeps 50 times as many running. The policy is `fair`. Prints the quiet
tenant's latencies, and how many times as long they are beside the flood as at an equal share (at most 1.5 is wanted).
"""

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import Process
from pathlib import Path

import httpx
import numpy as np
from live_server import LiveServer
from rich.console import Console
from rich.table import Table

from octavo.tenants.key_file import add_key

COMPANY = {"alone": 0, "equal share": 1, "flood": 50}  # streams of the other tenant for each of the quiet one's
BUSY = (429, 503)
WARM_UP = 3.0  # seconds before requests are measured
ROWS = ("first token, mean", "first token, p95", "whole, mean", "whole, p95", "requests")


@dataclass
class Latencies:
    """Of a tenant's requests, in seconds."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def figures(self) -> list[float]:
        """Return the mean and the 95th percentile of both."""
        return [figure for times in (self.first, self.whole) for figure in (np.mean(times), np.percentile(times, 95))]


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.yaml"
        secrets = [add_key(path, name=name) for name in ("quiet", "other")]
        flags = ["--scheduling-policy", "fair", "--max-batch-size", str(2 * args.streams), "--keys", str(path)]
        flags += ["--max-batch-tokens", "128", "--access-log", "none", *args.flags]
        with LiveServer(args.model, flags) as server:
            measured = measure(server.url, secrets, args)
    Console(width=100).print(table(measured))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=15, help="for each company (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=4, help="of the quiet tenant, half a batch (%(default)s)")
    parser.add_argument("--words", type=int, default=40, help="in each prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=24, help="tokens to generate for each (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="further flags of octavo serve, after --")
    return parser.parse_args()


def measure(url: str, secrets: list[str], args: argparse.Namespace) -> dict[str, Latencies]:
    """Return the quiet tenant's latencies in each company. The other tenant's client is a process of its own."""
    measured = {}
    for name, others in COMPANY.items():
        end = time.monotonic() + WARM_UP + args.seconds
        other = Process(target=run_streams, args=(url, secrets[1], args, others * args.streams, end))
        other.start()
        measured[name] = run_streams(url, secrets[0], args, args.streams, end)
        other.join()
    return measured


def run_streams(url: str, secret: str, args: argparse.Namespace, count: int, end: float) -> Latencies:
    """Keep so many streams of a tenant running until `end`. Return the latencies of those after the warm-up."""
    latencies, measured_from = Latencies(), end - args.seconds

    async def run() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            await asyncio.gather(
                *(stream(client, secret, args, latencies, measured_from, end, number) for number in range(count))
            )

    asyncio.run(run())
    return latencies


async def stream(
    client: httpx.AsyncClient,
    secret: str,
    args: argparse.Namespace,
    latencies: Latencies,
    measured_from: float,
    end: float,
    salt: int,
) -> None:
    """Send one request after the other until `end`; note those that begin after `measured_from`."""
    number = 0
    while time.monotonic() < end:
        number += 1
        prompt = f"{salt} {number} " + "word " * args.words
        body = {"prompt": prompt, "max_tokens": args.output_len, "ignore_eos": True, "stream": True, "temperature": 0}
        began, first = time.monotonic(), 0.0
        headers = {"Authorization": f"Bearer {secret}"}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            if reply.status_code in BUSY:
                await asyncio.sleep(0.1)
                continue
            reply.raise_for_status()
            async for _ in reply.aiter_bytes():
                first = first or time.monotonic()
        if began >= measured_from:
            latencies.first.append(first - began)
            latencies.whole.append(time.monotonic() - began)


def table(measured: dict[str, Latencies]) -> Table:
    """Return the figures of the quiet tenant: milliseconds, and flood divided by equal share."""
    shown = Table("milliseconds", *measured, "flood / equal share", title="The quiet tenant")
    columns = {name: [*latencies.figures(), len(latencies.whole)] for name, latencies in measured.items()}
    for i, row in enumerate(ROWS):
        cells = [columns[name][i] for name in measured]
        is_time = row != "requests"
        texts = [f"{1000 * cell:.0f}" if is_time else f"{cell}" for cell in cells]
        shown.add_row(row, *texts, f"{columns['flood'][i] / columns['equal share'][i]:.2f}" if is_time else "")
    return shown


if __name__ == "__main__":
    main()

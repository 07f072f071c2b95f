"""Timing across tenants: whether the time of an answer tells what another tenant has cached, or how a key begins.

    python benchmarks/timing_isolation.py [--model smollm2] [--samples 1000] [--tokens 96]

Three comparisons of two sets of samples, taken in turns in an order at random, each by Mann-Whitney's test:

- prefix: the time to the first token of prompts that another tenant has just sent, and of prompts that nobody has sent;
- control: the same, but the tenant has sent the prompts itself. This must differ, or the test could not find anything;
- key: the time to refuse a wrong key that differs from a right one in its last character only, and one at random.

Printed: both medians, the probability that a value of the first set is the greater one (0.5: no difference), and the
p-value. The exit code is 1 if p is below 0.001 for prefix or key, or above it for control.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import numpy as np
from live_server import LiveServer

from octavo.tenants.key import new_secret
from octavo.tenants.key_file import add_key

SIGNIFICANT = 0.001
FLAGS = ("--access-log", "none")

Sample = Callable[[], float]


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the probability that a value of `first` is above one of `second`, and the two-sided p-value.

    The p-value is that of the normal approximation; there are hardly any ties among times in nanoseconds.
    """
    n, m = len(first), len(second)
    ranks = np.empty(n + m)
    ranks[np.argsort(np.concatenate([first, second]), kind="stable")] = np.arange(1, n + m + 1)
    greater = ranks[:n].sum() - n * (n + 1) / 2
    z = (greater - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
    return float(greater / (n * m)), math.erfc(abs(z) / math.sqrt(2))


def compare(name: str, first: Sample, second: Sample, count: int) -> float:
    """Take `count` samples of each in turns, print how they differ, and return the p-value."""
    found: dict[Sample, list[float]] = {first: [], second: []}
    for _ in range(count):
        for sample in random.sample([first, second], 2):
            found[sample].append(sample())
    share, p = mann_whitney(found[first], found[second])
    medians = [1e3 * float(np.median(found[sample])) for sample in (first, second)]
    print(f"{name:<8} {medians[0]:.3f} ms and {medians[1]:.3f} ms, greater: {share:.3f}, p = {p:.3g}", flush=True)
    return p


class Tenants:
    """Two tenants of a server, and requests of theirs that are timed."""

    def __init__(self, url: str, keys: Sequence[str], tokens: int):
        self.alice, self.bob = (
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) for key in keys
        )
        self.nobody = httpx.Client(base_url=url, timeout=60)
        self._tokens, self._numbers = tokens, iter(range(10**9))

    def fresh(self) -> str:
        """Return a prompt that was not sent before, and differs from all others in its first page."""
        return f"{next(self._numbers):09} " + "word " * self._tokens

    def ask(self, who: httpx.Client, prompt: str) -> float:
        """Return the seconds until the only token of an answer."""
        began = time.perf_counter()
        who.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1, "ignore_eos": True}).raise_for_status()
        return time.perf_counter() - began

    def after(self, who: httpx.Client, same: bool) -> Sample:
        """Return a sample: Bob's request after one of `who`, for the same prompt or another."""

        def sample() -> float:
            prompt = self.fresh()
            self.ask(who, prompt)
            return self.ask(self.bob, prompt if same else self.fresh())

        return sample

    def refused(self, key: Callable[[], str]) -> Sample:
        """Return a sample: the seconds until a key is refused."""

        def sample() -> float:
            headers = {"Authorization": f"Bearer {key()}"}
            began = time.perf_counter()
            assert self.nobody.get("/v1/models", headers=headers).status_code == 401
            return time.perf_counter() - began

        return sample


def near(key: str) -> str:
    """Return a wrong key that differs from `key` in its last character."""
    return key[:-1] + random.choice([c for c in "abcdefgh" if c != key[-1]])


def measure(url: str, keys: Sequence[str], samples: int, tokens: int) -> bool:
    """Make all comparisons. Return whether they are as they should be."""
    tenants = Tenants(url, keys, tokens)
    for _ in range(20):
        tenants.after(tenants.alice, same=True)()
    others, own = tenants.alice, tenants.bob
    prefix = compare("prefix", tenants.after(others, True), tenants.after(others, False), samples)
    control = compare("control", tenants.after(own, True), tenants.after(own, False), max(samples // 4, 20))
    key = compare("key", tenants.refused(lambda: near(keys[0])), tenants.refused(new_secret), samples)
    return prefix >= SIGNIFICANT and key >= SIGNIFICANT and control < SIGNIFICANT


def main() -> None:
    parser = argparse.ArgumentParser(description="Look for differences in time between tenants.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=96)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.yaml"
        keys = [add_key(file, name=name) for name in ("alice", "bob")]
        with LiveServer(arguments.model, [*FLAGS, "--keys", str(file)]) as server:
            is_well = measure(server.url, keys, arguments.samples, arguments.tokens)
    sys.exit(not is_well)


if __name__ == "__main__":
    main()

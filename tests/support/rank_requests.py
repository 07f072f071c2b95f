"""Requests to engines of several ranks, and the processes of their ranks."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo import RequestOutput, SamplingParams

PROMPTS = [[(7 * i + 11 * k) % 500 + 3 for i in range(length)] for k, length in enumerate((3, 40, 150, 97, 1, 64))]
PARAMS = [
    SamplingParams(
        temperature=0.9 * (i % 2), seed=i, max_tokens=12 + i, ignore_eos=True, logprobs=2,
        frequency_penalty=0.3 * (i % 3), structured_outputs={"regex": "([a-z]+ ){4,9}end"} if i == 3 else None,
    )
    for i in range(len(PROMPTS))
]  # fmt: skip


def answers(outputs: list[RequestOutput]) -> list[Any]:
    """Tokens and logprobs, to the bit."""
    return [
        (output.outputs[0].token_ids, [{token: lp.logprob for token, lp in each.items()} for each in logprobs])
        for output in outputs
        if (logprobs := output.outputs[0].logprobs) is not None
    ]


def children(pid: int, name: bytes) -> list[int]:
    """The child processes of `pid` with this in their command lines."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                if name in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def ranks_of(pid: int) -> list[int]:
    return children(pid, b"rank_main")


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends as it is read
        return True

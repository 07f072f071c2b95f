"""Generated traces of conversations: several turns each, with system prompts that many conversations share."""

import random
from dataclasses import dataclass

from .trace import TraceRequest

SPREAD = 0.8  # sigma of the log-normal distributions: about one length in six is more than twice its median


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """The distributions of a generated trace.

    Args:
        requests: Number of requests in all.
        rate: Mean number of requests per second, if the time to serve one is short beside `think_time`; None if all
            conversations begin at once.
        turns: Mean number of requests in a conversation. The number is geometrically distributed.
        think_time: Mean seconds from the end of an answer to the next request, exponentially distributed.
        input_len, output_len: Mean tokens of a user's text and of an answer, log-normally distributed.
        system_prompts: Number of system prompts. The i-th most popular one begins a share of the conversations that is
            proportional to i ** -skew (Zipf's law).
        system_len: Tokens in each of them.
        max_len: Maximum tokens of prompt and answer; a conversation ends before it. None for no maximum.
        seed: The same seed gives the same trace.
    """

    requests: int
    rate: float | None
    turns: float
    think_time: float
    input_len: int
    output_len: int
    system_prompts: int
    system_len: int
    skew: float
    seed: int
    max_len: int | None = None

    def trace(self) -> list[TraceRequest]:
        """Return the requests in order of the conversations' beginnings, which are a Poisson process."""
        rng, at, trace = random.Random(self.seed), 0.0, list[TraceRequest]()
        while len(trace) < self.requests:
            conversation = self._conversation(rng, at, f"c{len(trace)}")[: self.requests - len(trace)]
            trace += conversation
            at += _exponential(rng, len(conversation) / self.rate if self.rate else 0.0)
        return trace

    def _conversation(self, rng: random.Random, at: float, name: str) -> list[TraceRequest]:
        popularity = [(i + 1) ** -self.skew for i in range(self.system_prompts)]
        system = rng.choices(range(self.system_prompts), popularity)[0]
        length, requests = self.system_len, list[TraceRequest]()
        while not requests or rng.random() < 1 - 1 / self.turns:
            prompt, output = length + _around(rng, self.input_len), _around(rng, self.output_len)
            if self.max_len is not None and prompt + output > self.max_len:
                if requests:
                    break
                prompt = max(1, self.max_len - output)
            requests.append(
                TraceRequest(
                    at=at,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    prefix=f"system{system}",
                    prefix_tokens=self.system_len,
                    conversation=name,
                    think_time=_exponential(rng, self.think_time) if requests else None,
                )
            )
            length = prompt + output
        return requests


def _exponential(rng: random.Random, mean: float) -> float:
    return rng.expovariate(1 / mean) if mean else 0.0


def _around(rng: random.Random, mean: int) -> int:
    """Return a random length of at least 1 with the given mean."""
    return max(1, round(mean * rng.lognormvariate(-(SPREAD**2) / 2, SPREAD)))

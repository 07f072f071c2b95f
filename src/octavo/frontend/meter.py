"""Meter: count the requests and tokens of one model, and measure their latencies, for GET /metrics."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

from octavo.outputs import FinishReason

from .live import LiveCompletion, LiveRequest

MAX_TENANTS = 200  # tenants of a model that are counted by name; later ones count as OTHER
OTHER = "other"
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
TOKEN = (*(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),)
REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
SIZE = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
COUNT = (1, 2, 5, 10, 20)
INTER_TOKEN = "inter_token_latency_seconds"
HISTOGRAMS: dict[str, Sequence[float]] = {
    INTER_TOKEN: TOKEN,
    "request_time_per_output_token_seconds": TOKEN,
    "e2e_request_latency_seconds": REQUEST,
    "request_queue_time_seconds": REQUEST,
    "request_prefill_time_seconds": REQUEST,
    "request_decode_time_seconds": REQUEST,
    "request_inference_time_seconds": REQUEST,
    "request_prompt_tokens": SIZE,
    "request_prefill_kv_computed_tokens": SIZE,
    "request_generation_tokens": SIZE,
    "request_max_num_generation_tokens": SIZE,
    "request_params_max_tokens": SIZE,
    "request_params_n": COUNT,
}
"""The upper bounds of the buckets of each histogram of an engine, by vLLM's names."""


class Histogram:
    """Counts values in buckets: in bucket i those from bounds[i - 1], exclusive, to bounds[i], inclusive."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> "Histogram":
        copy = Histogram(self.bounds)
        copy.counts, copy.sum = self.counts[:], self.sum
        return copy


@dataclass(slots=True)
class TenantCounts:
    """Counts of one tenant's requests on one engine.

    Attributes:
        requests: prompts whose requests have ended, for whatever reason.
        finished: completions that have ended, by reason.
        prompt_tokens, cached_tokens: tokens of prompts that have a first token, and those found in the prefix cache.
        generated_tokens: tokens of outputs.
        first_token: seconds from arrival to the first token.
    """

    requests: int = 0
    finished: Counter[FinishReason] = field(default_factory=lambda: Counter(dict.fromkeys(get_args(FinishReason), 0)))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN))

    def copy(self) -> "TenantCounts":
        numbers = self.prompt_tokens, self.cached_tokens, self.generated_tokens
        return TenantCounts(self.requests, self.finished.copy(), *numbers, self.first_token.copy())


class EngineMeter:
    """Measures the requests that one engine, or its replacements, serve.

    Args:
        names: the tenants of the model that are counted by name; shared by its engines.

    Attributes:
        restarts: engines that have ended unexpectedly.
    """

    def __init__(self, names: set[str]):
        self._names = names
        self.tenants = {"": TenantCounts()}  # the series of requests without a tenant are there before the first one
        self.histograms = {name: Histogram(bounds) for name, bounds in HISTOGRAMS.items()}
        self.restarts = 0
        self._inter_token = self.histograms[INTER_TOKEN]

    def copy(self) -> "EngineMeter":
        copy = EngineMeter(self._names)
        copy.tenants = {name: counts.copy() for name, counts in self.tenants.items()}
        copy.histograms = {name: histogram.copy() for name, histogram in self.histograms.items()}
        copy.restarts = self.restarts
        return copy

    def advanced(self, live: LiveRequest, completion: LiveCompletion, now: float) -> None:
        """Note that a completion has got an output of the engine, which may be its last.

        Args:
            now: time.monotonic(), the same for all outputs of a step.
        """
        tenant = completion.request.tenant
        counts = self.tenants.get(tenant) or self._counts(tenant)
        num_tokens = len(completion.token_ids)
        counts.generated_tokens += num_tokens - completion.num_metered
        before, completion.num_metered, completion.metered_at = completion.metered_at, num_tokens, now
        if not before:
            self._prompt_computed(live, completion, counts)
        elif before != now:  # further tokens of the same step are accepted draft tokens
            self._inter_token.observe(now - before)
        if completion.finish_reason:
            self._completion_ended(live, completion, counts)

    def ended_early(self, live: LiveRequest, reason: FinishReason) -> None:
        """Note that a request was aborted or has failed. Its latencies are not measured."""
        counts = self._counts(live.completions[0].request.tenant)
        counts.requests += 1
        counts.finished[reason] += len(live.unfinished)

    def _counts(self, tenant: str) -> TenantCounts:
        if tenant not in self._names:
            if len(self._names) < MAX_TENANTS:
                self._names.add(tenant)
            else:
                tenant = OTHER
        if (counts := self.tenants.get(tenant)) is None:
            counts = self.tenants[tenant] = TenantCounts()
        return counts

    def _prompt_computed(self, live: LiveRequest, completion: LiveCompletion, counts: TenantCounts) -> None:
        if live.prompt_metered:
            return
        live.prompt_metered = True
        counts.prompt_tokens += len(live.prompt_token_ids)
        counts.cached_tokens += live.metrics.cached_tokens
        if completion.token_ids and live.metrics.time_to_first_token is not None:
            counts.first_token.observe(live.metrics.time_to_first_token)

    def _completion_ended(self, live: LiveRequest, completion: LiveCompletion, counts: TenantCounts) -> None:
        assert completion.finish_reason is not None
        counts.finished[completion.finish_reason] += 1
        num_tokens, metrics = len(completion.token_ids), live.metrics
        self.histograms["request_generation_tokens"].observe(num_tokens)
        if num_tokens > 1 and metrics.time_to_first_token is not None:
            decode_time = completion.metered_at - live.arrival - metrics.time_to_first_token
            self.histograms["request_time_per_output_token_seconds"].observe(max(decode_time, 0.0) / (num_tokens - 1))
        if live.finished:
            counts.requests += 1
            self._request_ended(live)

    def _request_ended(self, live: LiveRequest) -> None:
        metrics, params = live.metrics, live.params
        assert metrics.finished_time is not None and metrics.time_to_first_token is not None
        latency, first = metrics.finished_time - metrics.arrival_time, metrics.time_to_first_token
        queued, prompt_tokens = metrics.time_in_queue or 0.0, len(live.prompt_token_ids)
        values = {
            "e2e_request_latency_seconds": latency,
            "request_queue_time_seconds": queued,
            "request_prefill_time_seconds": first - queued,
            "request_decode_time_seconds": latency - first,
            "request_inference_time_seconds": latency - queued,
            "request_prompt_tokens": prompt_tokens,
            "request_prefill_kv_computed_tokens": prompt_tokens - metrics.cached_tokens,
            "request_max_num_generation_tokens": max(len(each.token_ids) for each in live.completions),
            "request_params_n": params.n,
        }
        if params.max_tokens is not None:
            values["request_params_max_tokens"] = params.max_tokens
        for name, value in values.items():
            self.histograms[name].observe(value)


class Meter:
    """Measures the requests of one model. It outlives the model's engines, so its counts never go down.

    Attributes:
        engines: by number.
        refused: requests that were refused because the queue was full.
    """

    def __init__(self) -> None:
        self.engines: dict[int, EngineMeter] = {}
        self.refused = 0
        self._names: set[str] = set()

    def engine(self, number: int) -> EngineMeter:
        """Return the meter of an engine."""
        meter = self.engines.get(number)
        if meter is None:
            meter = self.engines[number] = EngineMeter(self._names)
        return meter

    def copy(self) -> "Meter":
        """Return a snapshot."""
        copy = Meter()
        copy.engines = {number: engine.copy() for number, engine in self.engines.items()}
        copy.refused = self.refused
        return copy

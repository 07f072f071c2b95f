"""Metrics in the form of vLLM's LLM.get_metrics: counters and gauges with vLLM's names, for each engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.engine.messages import EngineStats

from .stats import ReplicaStats


@dataclass(frozen=True, slots=True)
class Metric:
    """Base of all metrics. The labels are the name of the model and the number of the engine."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """A number that counts from the engine's start."""

    value: int


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """A number that goes up and down."""

    value: float


GAUGES: dict[str, Callable[[EngineStats], float]] = {
    "vllm:num_requests_running": lambda stats: stats.running,
    "vllm:num_requests_waiting": lambda stats: stats.waiting,
    "vllm:kv_cache_usage_perc": lambda stats: 1 - (stats.free_pages + stats.cached_pages) / stats.num_pages,
}
COUNTERS: dict[str, Callable[[EngineStats], int]] = {
    "vllm:num_preemptions": lambda stats: stats.preemptions,
    "vllm:prompt_tokens": lambda stats: stats.prompt_tokens,
    "vllm:generation_tokens": lambda stats: stats.tokens_generated,
    "vllm:prefix_cache_queries": lambda stats: stats.prompt_tokens,
    "vllm:prefix_cache_hits": lambda stats: stats.cached_tokens,
    "vllm:spec_decode_num_draft_tokens": lambda stats: stats.draft_tokens,
    "vllm:spec_decode_num_accepted_tokens": lambda stats: stats.accepted_tokens,
}


def metrics_of(replicas: Sequence[ReplicaStats], model: str) -> list[Metric]:
    """Return the metrics of all engines that have answered."""
    metrics: list[Metric] = []
    for number, replica in enumerate(replicas):
        if (stats := replica.engine) is not None:
            labels = {"model_name": model, "engine": str(number)}
            metrics += [Gauge(name, labels, read(stats)) for name, read in GAUGES.items()]
            metrics += [Counter(name, labels, count(stats)) for name, count in COUNTERS.items()]
    return metrics

"""Families: the metrics of a snapshot under vLLM's names, for prometheus_client to render."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from octavo.engine.messages import PREEMPTIONS, STEP_TOKENS, EngineStats
from octavo.frontend.meter import SIZE, EngineMeter, Histogram, TenantCounts
from octavo.frontend.metrics import GAUGES

if TYPE_CHECKING:
    from .exporter import EngineNow, Snapshot

ENGINE = ("model_name", "engine")
TENANT = (*ENGINE, "tenant")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
GAUGE_HELP = {
    "vllm:num_requests_running": "Sequences that are being computed.",
    "vllm:num_requests_waiting": "Sequences that wait for admission.",
    "vllm:kv_cache_usage_perc": "Share of the KV cache's pages that sequences and KV states use, from 0 to 1.",
}
ENGINE_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_preemptions": ("Preemptions.", lambda stats: stats.preemptions),
    "vllm:spec_decode_num_drafts": ("Drafts, each of some draft tokens.", lambda stats: sum(stats.accepted)),
    "vllm:spec_decode_num_draft_tokens": ("Draft tokens computed.", lambda stats: stats.draft_tokens),
    "vllm:spec_decode_num_accepted_tokens": ("Draft tokens accepted.", lambda stats: stats.accepted_tokens),
    "vllm:corrupted_requests": ("Sequences that ended because of NaN or infinite logits.", lambda stats: stats.damaged),
}
TENANT_COUNTERS: dict[str, tuple[str, Callable[[TenantCounts], float]]] = {
    "vllm_requests": ("Prompts whose requests have ended, for whatever reason.", lambda counts: counts.requests),
    "vllm:prompt_tokens": ("Tokens of prompts.", lambda counts: counts.prompt_tokens),
    "vllm:generation_tokens": ("Tokens of outputs.", lambda counts: counts.generated_tokens),
    "vllm:prompt_tokens_cached": ("Tokens of prompts found in the cache.", lambda counts: counts.cached_tokens),
    "vllm:prefix_cache_queries": ("Tokens of prompts looked up in the cache.", lambda counts: counts.prompt_tokens),
    "vllm:prefix_cache_hits": ("Tokens of prompts found in the cache.", lambda counts: counts.cached_tokens),
}
HISTOGRAM_HELP = {
    "inter_token_latency_seconds": "Time between two steps that gave a completion tokens.",
    "request_time_per_output_token_seconds": "Time per token after the first one, for each completion.",
    "e2e_request_latency_seconds": "Time from arrival to the last token.",
    "request_queue_time_seconds": "Time from arrival to the first step.",
    "request_prefill_time_seconds": "Time from the first step to the first token.",
    "request_decode_time_seconds": "Time from the first to the last token.",
    "request_inference_time_seconds": "Time from the first step to the last token.",
    "request_prompt_tokens": "Tokens of the prompt.",
    "request_prefill_kv_computed_tokens": "Tokens of the prompt that were not found in the cache.",
    "request_generation_tokens": "Tokens of each completion.",
    "request_max_num_generation_tokens": "Tokens of a request's longest completion.",
    "request_params_max_tokens": "The parameter max_tokens, if it is given.",
    "request_params_n": "The parameter n.",
}


class Families(Collector):
    """The metrics of a snapshot."""

    def __init__(self, snapshot: "Snapshot"):
        self._snapshot = snapshot
        self._lengths = {engine.model: engine.max_model_len for engine in snapshot.engines}
        self._meters: list[tuple[tuple[str, str], EngineMeter]] = [
            ((name, str(number)), engine)
            for name, meter in snapshot.meters.items()
            for number, engine in meter.engines.items()
        ]
        self._tenants = [
            ((*labels, tenant), counts) for labels, engine in self._meters for tenant, counts in engine.tenants.items()
        ]

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        yield from self._now()
        yield from self._of_tenants()
        yield from self._of_engines()
        yield from self._of_requests()
        yield from self._of_machine()
        yield from self._of_http()

    def _now(self) -> Iterator[Metric]:
        engines = self._snapshot.engines
        for name, help in GAUGE_HELP.items():
            read = GAUGES[name]
            values: defaultdict[tuple[str, str], float] = defaultdict(float)  # a model that is swapped has two engines
            for engine in engines:
                value = engine.waiting if "waiting" in name else read(engine.stats) if engine.stats else 0.0
                values[_labels(engine)] += value
            yield _gauge(name, help, ENGINE, values.items())
        waiting: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        asleep: dict[tuple[str, str, str], float] = {}
        for engine in engines:
            deferred = engine.stats.waiting_for_pages + engine.stats.waiting_for_prompt if engine.stats else 0
            waiting[*_labels(engine), "deferred"] += deferred
            waiting[*_labels(engine), "capacity"] += engine.waiting - deferred
            state = "awake" if engine.stats else "discard_all"
            asleep |= {(*_labels(engine), each): float(each == state) for each in SLEEP_STATES}
        help = "Waiting sequences: for capacity, or deferred until pages are fetched or the same prompt is computed."
        yield _gauge("vllm:num_requests_waiting_by_reason", help, (*ENGINE, "reason"), waiting.items())
        help = "1 for the engine's state: awake, or discard_all if no process serves the model."
        yield _gauge("vllm:engine_sleep_state", help, (*ENGINE, "sleep_state"), asleep.items())
        yield from self._cache_config()

    def _cache_config(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("vllm:cache_config_info", "Settings of the KV cache, as labels.")
        for engine in self._snapshot.engines:
            if engine.stats is not None:
                labels = dict(zip(ENGINE, _labels(engine), strict=True)) | _cache_labels(engine)
                family.add_sample(family.name, labels, 1.0)
        yield family

    def _of_tenants(self) -> Iterator[Metric]:
        tenants = self._tenants
        for name, (help, read) in TENANT_COUNTERS.items():
            yield _counter(name, help, TENANT, [(labels, read(counts)) for labels, counts in tenants])
        generated = Metric("vllm_tokens_generated", "Tokens of outputs; only grows.", "unknown")
        for labels, counts in tenants:
            generated.add_sample(generated.name, dict(zip(TENANT, labels, strict=True)), counts.generated_tokens)
        yield generated
        finished = [
            ((*labels, reason), number) for labels, counts in tenants for reason, number in counts.finished.items()
        ]
        help = "Completions that have ended, by reason."
        yield _counter("vllm:request_success", help, (*TENANT, "finished_reason"), finished)
        by_source = []
        for labels, counts in tenants:
            by_source.append(((*labels, "local_cache_hit"), counts.cached_tokens))
            by_source.append(((*labels, "local_compute"), counts.prompt_tokens - counts.cached_tokens))
        help = "Tokens of prompts: computed, or found in the cache."
        yield _counter("vllm:prompt_tokens_by_source", help, (*TENANT, "source"), by_source)
        first = [(labels, counts.first_token) for labels, counts in tenants]
        yield _histogram("vllm:time_to_first_token_seconds", "Time from arrival to the first token.", TENANT, first)

    def _of_engines(self) -> Iterator[Metric]:
        totals = [((name, str(number)), stats) for (name, number), stats in self._snapshot.totals.items()]
        for name, (help, read) in ENGINE_COUNTERS.items():
            yield _counter(name, help, ENGINE, [(labels, read(stats)) for labels, stats in totals])
        accepted = []
        for labels, stats in totals:
            at_least = list(accumulate(reversed(stats.accepted)))[-2::-1]  # drafts with more than 0, 1, 2, ... accepted
            accepted += [((*labels, str(position)), number) for position, number in enumerate(at_least) if number]
        help = "Draft tokens accepted, by their position in the draft."
        yield _counter("vllm:spec_decode_num_accepted_tokens_per_pos", help, (*ENGINE, "position"), accepted)
        steps, preempted = [], []
        for labels, stats in totals:
            rows = float(stats.tokens_computed + stats.draft_tokens)
            steps.append((labels, _filled(STEP_TOKENS, stats.step_tokens, rows)))
            preempted.append((labels, _filled(PREEMPTIONS, stats.preempted, float(stats.preemptions_of_ended))))
        yield _histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", ENGINE, steps)
        yield _histogram("vllm:request_num_preemptions", "Preemptions of a sequence that has ended.", ENGINE, preempted)
        rates = [((name, str(number)), rate) for (name, number), rate in self._snapshot.swap_rates.items()]
        help = "KV pages per second that moved to and from kv_disk or kv_host_memory in the last 10 seconds or more."
        yield _gauge("vllm_kv_cache_swap_rate", help, ENGINE, rates)

    def _of_requests(self) -> Iterator[Metric]:
        for name, help in HISTOGRAM_HELP.items():
            histograms = [(labels, self._cut(labels[0], meter.histograms[name])) for labels, meter in self._meters]
            yield _histogram(f"vllm:{name}", help, ENGINE, histograms)
        restarts = [(labels, meter.restarts) for labels, meter in self._meters]
        yield _counter("octavo_engine_restarts", "Engines that have ended unexpectedly.", ENGINE, restarts)
        refused = [((name, "0", "max_queue"), meter.refused) for name, meter in self._snapshot.meters.items()]
        help = "Requests refused because the queue was full."
        yield _counter("vllm:admission_rejections", help, (*ENGINE, "reason"), refused)

    def _of_machine(self) -> Iterator[Metric]:
        devices = [((name,), percent) for name, percent in self._snapshot.devices.items()]
        help = "Utilization of each GPU, or of each core if there is none, in percent."
        yield _gauge("vllm_gpu_utilization_percent", help, ("device",), devices)

    def _of_http(self) -> Iterator[Metric]:
        http = self._snapshot.http
        labels = ("handler", "method", "status")
        yield _counter("http_requests", "HTTP requests, by route and status.", labels, http.requests.items())
        help = "Time from an HTTP request to the end of its response."
        yield _histogram("http_request_duration_seconds", help, ("handler", "method"), http.durations.items())

    def _cut(self, model: str, histogram: Histogram) -> Histogram:
        """Leave out the buckets of a histogram of tokens that are beyond the model's length."""
        length = self._lengths.get(model, 0)
        bounds = [bound for bound in histogram.bounds if bound <= length]
        if histogram.bounds is not SIZE or not length or len(bounds) == len(SIZE):
            return histogram
        counts = [*histogram.counts[: len(bounds)], sum(histogram.counts[len(bounds) :])]
        return _filled(bounds, counts, histogram.sum)


def _labels(engine: "EngineNow") -> tuple[str, str]:
    return engine.model, str(engine.number)


def _cache_labels(engine: "EngineNow") -> dict[str, str]:
    config, stats = engine.config, engine.stats
    assert stats is not None
    offloading = "disk" if config.kv_disk else "host" if config.kv_host_memory else "None"
    size = config.kv_disk_size if config.kv_disk else config.kv_host_memory
    return {
        "num_gpu_blocks": str(stats.num_pages),
        "block_size": str(config.kv_cache_page_size),
        "cache_dtype": config.kv_cache_dtype,
        "gpu_memory_utilization": "None",
        "enable_prefix_caching": str(config.enable_prefix_caching),
        "prefix_caching_hash_algo": "blake2b",
        "num_cpu_blocks": "None",
        "kv_offloading_backend": offloading,
        "kv_offloading_size": str(size),
    }


def _filled(bounds: Sequence[float], counts: Sequence[int], sum: float) -> Histogram:
    histogram = Histogram(bounds)
    histogram.counts, histogram.sum = list(counts), sum
    return histogram


def _gauge(
    name: str, help: str, labels: Sequence[str], values: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help, labels=labels)
    for each, value in values:
        family.add_metric(each, value)
    return family


def _counter(
    name: str, help: str, labels: Sequence[str], values: Iterable[tuple[tuple[str, ...], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=labels)
    for each, value in values:
        family.add_metric(each, value)
    return family


def _histogram(
    name: str, help: str, labels: Sequence[str], histograms: Iterable[tuple[tuple[str, ...], Histogram]]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, help, labels=labels)
    for each, histogram in histograms:
        bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
        family.add_metric(each, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum)
    return family

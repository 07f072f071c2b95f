"""Families: the metrics of a snapshot, under vLLM's names."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from octavo.engine.messages import PREEMPTIONS, STEP_TOKENS, EngineStats
from octavo.frontend.meter import SIZE, EngineMeter, Histogram, TenantCounts
from octavo.frontend.metrics import GAUGES
from octavo.kv.tiers.counts import TierCounts

from .text_format import Family

if TYPE_CHECKING:
    from .exporter import EngineNow, Snapshot

ENGINE = ("model_name", "engine")
TENANT = (*ENGINE, "tenant")
CACHE = (
    *("num_gpu_blocks", "block_size", "cache_dtype", "enable_prefix_caching", "prefix_caching_hash_algo"),
    *("kv_offloading_backend", "kv_offloading_size", "num_cpu_blocks", "gpu_memory_utilization"),
)
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
GAUGE_HELP = {
    "vllm:num_requests_running": "Sequences that are being computed.",
    "vllm:num_requests_waiting": "Sequences that wait for admission.",
    "vllm:kv_cache_usage_perc": "Share of the KV cache's pages that sequences and KV states use, from 0 to 1.",
}
ENGINE_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_preemptions_total": ("Preemptions.", lambda stats: stats.preemptions),
    "vllm:spec_decode_num_drafts_total": ("Drafts, each of some draft tokens.", lambda stats: sum(stats.accepted)),
    "vllm:spec_decode_num_draft_tokens_total": ("Draft tokens computed.", lambda stats: stats.draft_tokens),
    "vllm:spec_decode_num_accepted_tokens_total": ("Draft tokens accepted.", lambda stats: stats.accepted_tokens),
    "octavo_kv_pages_fetched_total": (
        "KV pages fetched from kv_disk, kv_host_memory, kv_store or a loaded KV state.",
        lambda stats: stats.pages_fetched,
    ),
    "octavo_kv_pages_saved_total": (
        "KV pages saved to kv_disk, kv_host_memory or kv_store.",
        lambda stats: stats.pages_saved,
    ),
    "vllm:corrupted_requests_total": (
        "Sequences that ended because of NaN or infinite logits.",
        lambda stats: stats.damaged,
    ),
}
TIER_COUNTERS: dict[str, tuple[str, Callable[[TierCounts], float]]] = {
    "octavo_kv_tier_hits_total": ("KV pages read from a tier.", lambda counts: counts.hits),
    "octavo_kv_tier_misses_total": (
        "KV pages asked of a tier that it did not have.",
        lambda counts: counts.misses,
    ),
    "octavo_kv_tier_read_bytes_total": ("Bytes of KV pages read from a tier.", lambda counts: counts.bytes_read),
    "octavo_kv_tier_written_bytes_total": ("Bytes of KV pages written to a tier.", lambda counts: counts.bytes_written),
    "octavo_kv_tier_read_seconds_total": ("Time in reads of KV pages from a tier.", lambda counts: counts.seconds),
    "octavo_kv_tier_errors_total": (
        "Calls of a tier that failed, and pages that were damaged in a shared store.",
        lambda counts: counts.errors,
    ),
}
TENANT_COUNTERS: dict[str, tuple[str, Callable[[TenantCounts], float]]] = {
    "vllm_requests_total": ("Prompts whose requests have ended, for whatever reason.", lambda counts: counts.requests),
    "vllm:prompt_tokens_total": ("Tokens of prompts.", lambda counts: counts.prompt_tokens),
    "vllm:generation_tokens_total": ("Tokens of outputs.", lambda counts: counts.generated_tokens),
    "vllm:prompt_tokens_cached_total": ("Tokens of prompts found in the cache.", lambda counts: counts.cached_tokens),
    "vllm:prefix_cache_queries_total": (
        "Tokens of prompts looked up in the cache.",
        lambda counts: counts.prompt_tokens,
    ),
    "vllm:prefix_cache_hits_total": ("Tokens of prompts found in the cache.", lambda counts: counts.cached_tokens),
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


class Families:
    """The metrics of a snapshot. Iterate over it for the families."""

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

    def __iter__(self) -> Iterator[Family]:
        yield from self._now()
        yield from self._of_tenants()
        yield from self._of_engines()
        yield from self._of_requests()
        yield from self._of_machine()
        yield from self._of_http()

    def _now(self) -> Iterator[Family]:
        engines = self._snapshot.engines
        for name, help in GAUGE_HELP.items():
            read = GAUGES[name]
            values: defaultdict[tuple[str, str], float] = defaultdict(float)  # a model that is swapped has two engines
            for engine in engines:
                value = engine.waiting if "waiting" in name else read(engine.stats) if engine.stats else 0
                labels = _labels(engine)
                values[labels] = max(values[labels], value) if "perc" in name else values[labels] + value
            yield Family(name, "gauge", help, ENGINE, values.items())
        waiting: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        asleep: dict[tuple[str, str, str], float] = {}
        for engine in engines:
            deferred = engine.stats.waiting_for_pages + engine.stats.waiting_for_prompt if engine.stats else 0
            waiting[*_labels(engine), "deferred"] += deferred
            waiting[*_labels(engine), "capacity"] += engine.waiting - deferred
            state = "awake" if engine.stats else "discard_all"
            asleep |= {(*_labels(engine), each): float(each == state) for each in SLEEP_STATES}
        help = "Waiting sequences: for capacity, or deferred until pages are fetched or the same prompt is computed."
        yield Family("vllm:num_requests_waiting_by_reason", "gauge", help, (*ENGINE, "reason"), waiting.items())
        help = "1 for the engine's state: awake, or discard_all if no process serves the model."
        yield Family("vllm:engine_sleep_state", "gauge", help, (*ENGINE, "sleep_state"), asleep.items())
        yield from self._cache_config()

    def _cache_config(self) -> Iterator[Family]:
        caches = {(*_labels(each), *_cache_values(each)): 1 for each in self._snapshot.engines if each.stats}
        help = "Settings of the KV cache, as labels."
        yield Family("vllm:cache_config_info", "gauge", help, (*ENGINE, *CACHE), caches.items())

    def _of_tenants(self) -> Iterator[Family]:
        tenants = self._tenants
        for name, (help, read) in TENANT_COUNTERS.items():
            yield Family(name, "counter", help, TENANT, [(labels, read(counts)) for labels, counts in tenants])
        generated = [(labels, counts.generated_tokens) for labels, counts in tenants]
        yield Family("vllm_tokens_generated", "untyped", "Tokens of outputs; only grows.", TENANT, generated)
        finished = [
            ((*labels, reason), number) for labels, counts in tenants for reason, number in counts.finished.items()
        ]
        help = "Completions that have ended, by reason."
        yield Family("vllm:request_success_total", "counter", help, (*TENANT, "finished_reason"), finished)
        by_source = []
        for labels, counts in tenants:
            by_source.append(((*labels, "local_cache_hit"), counts.cached_tokens))
            by_source.append(((*labels, "local_compute"), counts.prompt_tokens - counts.cached_tokens))
        help = "Tokens of prompts: computed, or found in the cache."
        yield Family("vllm:prompt_tokens_by_source_total", "counter", help, (*TENANT, "source"), by_source)
        first = [(labels, counts.first_token) for labels, counts in tenants]
        yield Family(
            "vllm:time_to_first_token_seconds", "histogram", "Time from arrival to the first token.", TENANT, first
        )

    def _of_engines(self) -> Iterator[Family]:
        totals = [((name, str(number)), stats) for (name, number), stats in self._snapshot.totals.items()]
        for name, (help, read) in ENGINE_COUNTERS.items():
            yield Family(name, "counter", help, ENGINE, [(labels, read(stats)) for labels, stats in totals])
        tiers = [((*labels, tier), counts) for labels, stats in totals for tier, counts in stats.tiers.items()]
        for name, (help, count) in TIER_COUNTERS.items():
            samples = [(labels, count(counts)) for labels, counts in tiers]
            yield Family(name, "counter", help, (*ENGINE, "tier"), samples)
        accepted = []
        for labels, stats in totals:
            at_least = list(accumulate(reversed(stats.accepted)))[-2::-1]  # drafts with more than 0, 1, 2, ... accepted
            accepted += [((*labels, str(position)), number) for position, number in enumerate(at_least) if number]
        help = "Draft tokens accepted, by their position in the draft."
        yield Family(
            "vllm:spec_decode_num_accepted_tokens_per_pos_total", "counter", help, (*ENGINE, "position"), accepted
        )
        steps, preempted = [], []
        for labels, stats in totals:
            rows = float(stats.tokens_computed + stats.draft_tokens)
            steps.append((labels, _filled(STEP_TOKENS, stats.step_tokens, rows)))
            preempted.append((labels, _filled(PREEMPTIONS, stats.preempted, float(stats.preemptions_of_ended))))
        yield Family("vllm:iteration_tokens_total", "histogram", "Tokens computed in a step.", ENGINE, steps)
        yield Family(
            "vllm:request_num_preemptions", "histogram", "Preemptions of a sequence that has ended.", ENGINE, preempted
        )
        rates = [((name, str(number)), rate) for (name, number), rate in self._snapshot.swap_rates.items()]
        help = "KV pages per second that came back from a lower tier, in the last 10 seconds or more."
        yield Family("vllm_kv_cache_swap_rate", "gauge", help, ENGINE, rates)

    def _of_requests(self) -> Iterator[Family]:
        for name, help in HISTOGRAM_HELP.items():
            histograms = [(labels, self._cut(labels[0], meter.histograms[name])) for labels, meter in self._meters]
            yield Family(f"vllm:{name}", "histogram", help, ENGINE, histograms)
        restarts = [(labels, meter.restarts) for labels, meter in self._meters]
        yield Family(
            "octavo_engine_restarts_total", "counter", "Engines that have ended unexpectedly.", ENGINE, restarts
        )
        refused = [((name, "0", "max_queue"), meter.refused) for name, meter in self._snapshot.meters.items()]
        help = "Requests refused because the queue was full."
        yield Family("vllm:admission_rejections_total", "counter", help, (*ENGINE, "reason"), refused)

    def _of_machine(self) -> Iterator[Family]:
        devices = [((name,), percent) for name, percent in self._snapshot.devices.items()]
        help = "Utilization of each GPU, or of each core if there is none, in percent."
        yield Family("vllm_gpu_utilization_percent", "gauge", help, ("device",), devices)

    def _of_http(self) -> Iterator[Family]:
        http = self._snapshot.http
        labels = ("handler", "method", "status")
        yield Family(
            "http_requests_total", "counter", "HTTP requests, by route and status.", labels, http.requests.items()
        )
        help = "Time from an HTTP request to the end of its response."
        yield Family("http_request_duration_seconds", "histogram", help, ("handler", "method"), http.durations.items())

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


def _cache_values(engine: "EngineNow") -> tuple[str, ...]:
    """Return the values of the labels CACHE."""
    config, stats = engine.config, engine.stats
    assert stats is not None
    offloading = "disk" if config.kv_disk else "host" if config.kv_host_memory else "None"
    size = config.kv_disk_size if config.kv_disk else config.kv_host_memory
    share = config.gpu_memory_utilization if config.backend_name == "cuda" else None
    values = (
        *(stats.num_pages, config.kv_cache_page_size, config.kv_cache_dtype, config.enable_prefix_caching, "blake2b"),
        *(offloading, size, None, share),
    )
    return tuple(map(str, values))


def _filled(bounds: Sequence[float], counts: Sequence[int], sum: float) -> Histogram:
    histogram = Histogram(bounds)
    histogram.counts, histogram.sum = list(counts), sum
    return histogram

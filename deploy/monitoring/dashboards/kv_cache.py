"""The dashboard of the KV cache."""

from ..grafana import Dashboard, Panel
from .queries import BY_ENGINE, ENGINE, VARIABLES, q, quantiles

KV_CACHE = Dashboard(
    "kv-cache",
    "Octavo: KV cache",
    "Whether memory holds the contexts that are in use, and what the cache saves.",
    VARIABLES,
    {
        "Memory": [
            Panel(
                "In use",
                "percentunit",
                "Share of each engine's pages that sequences and KV states use. Cached pages that can be evicted do "
                "not count.",
                {BY_ENGINE: q.series("vllm:kv_cache_usage_perc")},
                max=1.0,
            ),
            Panel(
                "Preemptions",
                "suffix:preemptions/s",
                "Sequences per second that gave up their pages for others.",
                {BY_ENGINE: q.rate("vllm:num_preemptions_total", *ENGINE)},
            ),
            Panel(
                "Waiting for memory or pages",
                "short",
                "Sequences that wait for capacity, and deferred ones, whose pages are fetched or whose prompt "
                "another completion computes.",
                {
                    "{{reason}}": q.sum("vllm:num_requests_waiting_by_reason", "reason"),
                },
                stacked=True,
            ),
        ],
        "Swapping": [
            Panel(
                "Swap rate",
                "suffix:pages/s",
                "Pages per second that came back from disk or host memory since memory could not hold them.",
                {BY_ENGINE: q.series("vllm_kv_cache_swap_rate")},
            ),
            Panel(
                "Pages fetched and saved",
                "suffix:pages/s",
                "Traffic with the lower tiers. Each full page is saved once, whether it is evicted later or not.",
                {
                    "fetched": q.rate("octavo_kv_pages_fetched_total"),
                    "saved": q.rate("octavo_kv_pages_saved_total"),
                },
            ),
        ],
        "Prefix cache": [
            Panel(
                "Found in the cache",
                "percentunit",
                "Share of prompt tokens that need not be computed.",
                {
                    "{{model_name}}": q.ratio(
                        "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "model_name"
                    ),
                },
                max=1.0,
            ),
            Panel(
                "Prompt tokens by source",
                "suffix:tokens/s",
                "Tokens of prompts that were computed, or found in the cache.",
                {
                    "{{source}}": q.rate("vllm:prompt_tokens_by_source_total", "source"),
                },
                stacked=True,
            ),
            Panel(
                "Prompt tokens to compute",
                "short",
                "Of each request, after what was found in the cache.",
                quantiles("vllm:request_prefill_kv_computed_tokens"),
            ),
        ],
        "Settings": [
            Panel(
                "KV caches",
                "short",
                "Pages (num_gpu_blocks), tokens in a page (block_size) and lower tiers of each engine.",
                {"": q.series("vllm:cache_config_info")},
                "table",
            ),
        ],
    },
)

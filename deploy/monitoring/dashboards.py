"""What the dashboards show."""

from .grafana import Dashboard, Panel, Variable
from .promql import EXPORTED, PromQL
from .rules import OBJECTIVE, RECORDED, SLOW, TTFT_TARGET

INSTANCE = {"instance": "$instance"}
MODEL = INSTANCE | {"model_name": "$model"}
machine = PromQL("$__rate_interval", INSTANCE, EXPORTED)
q = PromQL("$__rate_interval", MODEL, EXPORTED | RECORDED)
tenants = PromQL("$__rate_interval", MODEL | {"tenant": "$tenant"}, EXPORTED)
VARIABLES = (
    Variable("instance", "vllm:num_requests_running", "instance"),
    Variable("model", machine.series("vllm:num_requests_running"), "model_name"),
)
TENANT = Variable("tenant", q.series("vllm_requests_total"), "tenant")
ENGINE = ("instance", "model_name", "engine")
BY_ENGINE = "{{instance}} {{model_name}} {{engine}}"


def quantiles(histogram: str) -> dict[str, str]:
    """Return the queries of a panel with the median and the slow end of a histogram."""
    return {f"p{quantile * 100:g}": q.quantile(quantile, histogram) for quantile in (0.5, 0.95, 0.99)}


OVERVIEW = Dashboard(
    "overview", "Octavo: overview", "How much is served, how fast, and what waits.", VARIABLES,
    {
        "Now": [
            Panel("Requests", {"": q.rate("vllm_requests_total")}, "reqps", "Requests that end per second.", "stat"),
            Panel("Output", {"": q.rate("vllm_tokens_generated")}, "suffix: tokens/s", "Generated tokens per second.",
                  "stat"),
            Panel("First token, p95", {"": q.quantile(0.95, "vllm:time_to_first_token_seconds")}, "s",
                  "95 of 100 requests get their first token faster.", "stat"),
            Panel("Running", {"": q.sum("vllm:num_requests_running")}, "short", "Sequences that are computed now.",
                  "stat"),
            Panel("Waiting", {"": q.sum("vllm:num_requests_waiting")}, "short", "Sequences that wait now.", "stat"),
            Panel("KV cache in use", {"": f"max({q.series('vllm:kv_cache_usage_perc')})"}, "percentunit",
                  "Share of the fullest engine's pages that sequences and KV states use.", "stat"),
        ],
        "Latency": [
            Panel("Time to first token", quantiles("vllm:time_to_first_token_seconds"), "s",
                  "From the request's arrival to its first token."),
            Panel("Time between tokens", quantiles("vllm:inter_token_latency_seconds"), "s",
                  "Between two tokens of the same answer."),
            Panel("Whole request", quantiles("vllm:e2e_request_latency_seconds"), "s",
                  "From the request's arrival to its last token."),
        ],
        "Where the time goes": [
            Panel("Time of a request", {
                "waits": q.mean("vllm:request_queue_time_seconds"),
                "prompt": q.mean("vllm:request_prefill_time_seconds"),
                "output": q.mean("vllm:request_decode_time_seconds"),
            }, "s", "Mean time that requests wait, compute their prompt, and generate.", stacked=True),
            Panel("Queue", {
                "running": q.sum("vllm:num_requests_running"),
                "waiting: {{reason}}": q.sum("vllm:num_requests_waiting_by_reason", "reason"),
            }, "short", "Sequences. Deferred ones wait for pages from a lower tier, or for another's prompt.",
                  stacked=True),
            Panel("Late first tokens", {
                f"{{{{model_name}}}}, last {window}": q.series(SLOW + window) for window in ("5m", "1h", "6h")
            }, "percentunit", f"Share of first tokens after {TTFT_TARGET:g} s, on all servers. At most "
                  f"{1 - OBJECTIVE:.0%} is allowed."),
        ],
        "Work": [
            Panel("Ended, by reason", {"{{finished_reason}}": q.rate("vllm:request_success_total", "finished_reason")},
                  "ops", "Completions per second: stop and length are normal; abort: the client left; error: failed or "
                  "timed out.", stacked=True),
            Panel("Tokens", {
                "prompt: {{source}}": q.rate("vllm:prompt_tokens_by_source_total", "source"),
                "output": q.rate("vllm:generation_tokens_total"),
            }, "suffix: tokens/s", "Prompt tokens computed or found in the cache, and generated tokens, per second.",
                  stacked=True),
            Panel("HTTP responses", {
                "{{status}}": machine.rate("http_requests_total", "status"),
                "refused: the queue was full": q.rate("vllm:admission_rejections_total"),
            }, "reqps", "By class of status. 4xx: wrong requests; 5xx: refused or failed ones."),
        ],
    },
)  # fmt: skip


def by_tenant(expr: str) -> dict[str, str]:
    """Return the query of a panel with a line for each tenant; requests without one have the name "none"."""
    return {"{{tenant}}": f'label_replace({expr}, "tenant", "none", "tenant", "")'}


TENANTS = Dashboard(
    "tenants", "Octavo: tenants", "Who uses how much, and how each tenant is served.", (*VARIABLES, TENANT),
    {
        "Use": [
            Panel("Requests", by_tenant(tenants.rate("vllm_requests_total", "tenant")), "reqps",
                  "Requests that end per second.", stacked=True),
            Panel("Prompt tokens", by_tenant(tenants.rate("vllm:prompt_tokens_total", "tenant")), "suffix: tokens/s",
                  "Tokens of prompts per second, those found in the cache too.", stacked=True),
            Panel("Output tokens", by_tenant(tenants.rate("vllm:generation_tokens_total", "tenant")),
                  "suffix: tokens/s", "Generated tokens per second.", stacked=True),
        ],
        "Service": [
            Panel("Time to first token, p95", by_tenant(
                tenants.quantile(0.95, "vllm:time_to_first_token_seconds", "tenant")), "s",
                  "95 of 100 requests of the tenant get their first token faster."),
            Panel("Found in the cache", by_tenant(
                tenants.ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "tenant")),
                  "percentunit", "Share of the tenant's prompt tokens that need not be computed.", max=1.0),
            Panel("Aborts and errors", {
                f"{{{{tenant}}}}: {reason}": next(iter(by_tenant(
                    tenants.rate("vllm:request_success_total", "tenant", finished_reason=reason)).values()))
                for reason in ("abort", "error")
            }, "ops", "Completions per second that clients aborted, and that failed or timed out."),
        ],
        "In the time range": [
            Panel("Requests", by_tenant(tenants.increase("vllm_requests_total", "tenant")), "short",
                  "Requests that ended within the time range at the top.", "table"),
            Panel("Prompt tokens", by_tenant(tenants.increase("vllm:prompt_tokens_total", "tenant")), "short",
                  "Tokens of prompts within the time range at the top.", "table"),
            Panel("Output tokens", by_tenant(tenants.increase("vllm:generation_tokens_total", "tenant")), "short",
                  "Generated tokens within the time range at the top.", "table"),
        ],
    },
)  # fmt: skip

KV_CACHE = Dashboard(
    "kv-cache", "Octavo: KV cache", "Whether memory holds the contexts that are in use, and what the cache saves.",
    VARIABLES,
    {
        "Memory": [
            Panel("In use", {BY_ENGINE: q.series("vllm:kv_cache_usage_perc")}, "percentunit",
                  "Share of each engine's pages that sequences and KV states use. Cached pages that can be evicted do "
                  "not count.", max=1.0),
            Panel("Preemptions", {BY_ENGINE: q.rate("vllm:num_preemptions_total", *ENGINE)}, "ops",
                  "Sequences per second that gave up their pages for others."),
            Panel("Waiting for memory or pages", {
                "{{reason}}": q.sum("vllm:num_requests_waiting_by_reason", "reason"),
            }, "short", "Sequences that wait for capacity, and deferred ones, whose pages are fetched or whose prompt "
                  "another completion computes.", stacked=True),
        ],
        "Swapping": [
            Panel("Swap rate", {BY_ENGINE: q.series("vllm_kv_cache_swap_rate")}, "suffix: pages/s",
                  "Pages per second that came back from disk or host memory since memory could not hold them."),
            Panel("Pages fetched and saved", {
                "fetched": q.rate("octavo_kv_pages_fetched_total"), "saved": q.rate("octavo_kv_pages_saved_total"),
            }, "suffix: pages/s", "Traffic with the lower tiers. Each full page is saved once, whether it is evicted "
                  "later or not."),
        ],
        "Prefix cache": [
            Panel("Found in the cache", {
                "{{model_name}}": q.ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total",
                                          "model_name"),
            }, "percentunit", "Share of prompt tokens that need not be computed.", max=1.0),
            Panel("Prompt tokens by source", {
                "{{source}}": q.rate("vllm:prompt_tokens_by_source_total", "source"),
            }, "suffix: tokens/s", "Tokens of prompts that were computed, or found in the cache.", stacked=True),
            Panel("Prompt tokens to compute", quantiles("vllm:request_prefill_kv_computed_tokens"), "short",
                  "Of each request, after what was found in the cache."),
        ],
        "Settings": [
            Panel("KV caches", {"": q.series("vllm:cache_config_info")}, "short",
                  "Pages (num_gpu_blocks), tokens in a page (block_size) and lower tiers of each engine.", "table"),
        ],
    },
)  # fmt: skip

ENGINES = Dashboard(
    "engines", "Octavo: engines", "Each engine's load and health, and the machine below.", VARIABLES,
    {
        "Health": [
            Panel("Engines that serve", {"": q.sum("vllm:engine_sleep_state", sleep_state="awake")}, "short",
                  "Engines with a process that answers.", "stat"),
            Panel("Restarts", {"": q.increase("octavo_engine_restarts_total")}, "short",
                  "Engines that ended unexpectedly within the time range at the top.", "stat"),
            Panel("Damaged sequences", {"": q.increase("vllm:corrupted_requests_total")}, "short",
                  "Sequences that ended since the model computed NaN or infinity, within the time range at the top.",
                  "stat"),
        ],
        "Load": [
            Panel("Running", {BY_ENGINE: q.series("vllm:num_requests_running")}, "short",
                  "Sequences that are computed, by engine.", stacked=True),
            Panel("Waiting", {BY_ENGINE: q.series("vllm:num_requests_waiting")}, "short",
                  "Sequences that wait, by engine.", stacked=True),
            Panel("Output", {BY_ENGINE: q.rate("vllm:generation_tokens_total", *ENGINE)}, "suffix: tokens/s",
                  "Generated tokens per second, by engine.", stacked=True),
        ],
        "Steps": [
            Panel("Steps", {BY_ENGINE: q.rate("vllm:iteration_tokens_total_count", *ENGINE)}, "ops",
                  "Steps per second. A step computes some tokens of many sequences."),
            Panel("Tokens in a step", {BY_ENGINE: q.mean("vllm:iteration_tokens_total", *ENGINE)}, "short",
                  "Mean number of tokens that a step computes. More means better use of the weights read."),
            Panel("Draft tokens accepted", {
                BY_ENGINE: q.ratio("vllm:spec_decode_num_accepted_tokens_total",
                                   "vllm:spec_decode_num_draft_tokens_total", *ENGINE),
            }, "percentunit", "Share of speculative tokens that were right. Empty without speculation.", max=1.0),
            Panel("Accepted, by position", {
                "{{position}}": q.rate("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position"),
            }, "suffix: tokens/s", "Accepted draft tokens per second, by their position in the draft."),
        ],
        "Machine": [
            Panel("Devices", {
                "{{instance}} {{device}}": machine.series("vllm_gpu_utilization_percent"),
            }, "percent", "Utilization of each GPU, or of each core where there is none, by all processes.", max=100.0),
            Panel("Processor time of the server", {
                "{{instance}}": q.rate("process_cpu_seconds_total", "instance"),
            }, "short", "Cores that the server's process uses. Engines are processes of their own."),
            Panel("Memory of the server", {"{{instance}}": q.series("process_resident_memory_bytes")}, "bytes",
                  "Resident memory of the server's process, without its engines."),
            Panel("Open files", {
                "{{instance}}": f"{q.series('process_open_fds')} / {q.series('process_max_fds')}",
            }, "percentunit", "Share of the file descriptors that the server's process may open.", max=1.0),
        ],
    },
)  # fmt: skip

DASHBOARDS = (OVERVIEW, TENANTS, KV_CACHE, ENGINES)

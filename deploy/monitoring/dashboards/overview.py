"""The dashboard to begin with."""

from ..grafana import Dashboard, Panel
from ..rules import OBJECTIVE, SLOW, TTFT_TARGET
from .queries import VARIABLES, machine, q, quantiles

OVERVIEW = Dashboard(
    "overview",
    "Octavo: overview",
    "How much is served, how fast, and what waits.",
    VARIABLES,
    {
        "Now": [
            Panel("Requests", "reqps", "Requests that end per second.", {"": q.rate("vllm_requests_total")}, "stat"),
            Panel(
                "Output",
                "suffix:tokens/s",
                "Generated tokens per second.",
                {"": q.rate("vllm_tokens_generated")},
                "stat",
            ),
            Panel(
                "First token, p95",
                "s",
                "95 of 100 requests get their first token faster.",
                {"": q.quantile(0.95, "vllm:time_to_first_token_seconds")},
                "stat",
            ),
            Panel(
                "Running", "short", "Sequences that are computed now.", {"": q.sum("vllm:num_requests_running")}, "stat"
            ),
            Panel("Waiting", "short", "Sequences that wait now.", {"": q.sum("vllm:num_requests_waiting")}, "stat"),
            Panel(
                "KV cache in use",
                "percentunit",
                "Share of the fullest engine's pages that sequences and KV states use.",
                {"": f"max({q.series('vllm:kv_cache_usage_perc')})"},
                "stat",
            ),
        ],
        "Latency": [
            Panel(
                "Time to first token",
                "s",
                "From the request's arrival to its first token.",
                quantiles("vllm:time_to_first_token_seconds"),
            ),
            Panel(
                "Time between tokens",
                "s",
                "Between two tokens of the same answer.",
                quantiles("vllm:inter_token_latency_seconds"),
            ),
            Panel(
                "Whole request",
                "s",
                "From the request's arrival to its last token.",
                quantiles("vllm:e2e_request_latency_seconds"),
            ),
        ],
        "Where the time goes": [
            Panel(
                "Time of a request",
                "s",
                "Mean time that requests wait, compute their prompt, and generate.",
                {
                    "waits": q.mean("vllm:request_queue_time_seconds"),
                    "prompt": q.mean("vllm:request_prefill_time_seconds"),
                    "output": q.mean("vllm:request_decode_time_seconds"),
                },
                stacked=True,
            ),
            Panel(
                "Queue",
                "short",
                "Sequences. Deferred ones wait for pages from a lower tier, or for another's prompt.",
                {
                    "running": q.sum("vllm:num_requests_running"),
                    "waiting: {{reason}}": q.sum("vllm:num_requests_waiting_by_reason", "reason"),
                },
                stacked=True,
            ),
            Panel(
                "Late first tokens",
                "percentunit",
                f"Share of first tokens after {TTFT_TARGET:g} s, on all servers. At most "
                f"{1 - OBJECTIVE:.0%} is allowed.",
                {f"{{{{model_name}}}}, last {window}": q.series(SLOW + window) for window in ("5m", "1h", "6h")},
            ),
        ],
        "Work": [
            Panel(
                "Ended, by reason",
                "suffix:completions/s",
                "Completions per second: stop and length are normal; abort: the client left; error: failed or "
                "timed out.",
                {"{{finished_reason}}": q.rate("vllm:request_success_total", "finished_reason")},
                stacked=True,
            ),
            Panel(
                "Tokens",
                "suffix:tokens/s",
                "Prompt tokens computed or found in the cache, and generated tokens, per second.",
                {
                    "prompt: {{source}}": q.rate("vllm:prompt_tokens_by_source_total", "source"),
                    "output": q.rate("vllm:generation_tokens_total"),
                },
                stacked=True,
            ),
            Panel(
                "HTTP responses",
                "reqps",
                "By class of status. 4xx: wrong requests; 5xx: refused or failed ones.",
                {
                    "{{status}}": machine.rate("http_requests_total", "status"),
                    "refused: the queue was full": q.rate("vllm:admission_rejections_total"),
                },
            ),
        ],
    },
)

"""The dashboard of tenants."""

from ..grafana import Dashboard, Panel, Variable
from ..promql import EXPORTED, PromQL
from .queries import MODEL, VARIABLES, q

tenants = PromQL("$__rate_interval", MODEL | {"tenant": "$tenant"}, EXPORTED)
TENANT = Variable("tenant", q.series("vllm_requests_total"), "tenant")


def named(expr: str) -> str:
    """Return the values of tenants, where those of requests without a tenant have the name "none"."""
    return f'label_replace({expr}, "tenant", "none", "tenant", "")'


def by_tenant(expr: str) -> dict[str, str]:
    """Return the query of a panel with a line for each tenant."""
    return {"{{tenant}}": named(expr)}


def use(title: str, unit: str, description: str, counter: str) -> Panel:
    """Return a panel of how fast a counter grows, the tenants on top of each other."""
    return Panel(title, unit, description, by_tenant(tenants.rate(counter, "tenant")), stacked=True)


TENANTS = Dashboard(
    "tenants",
    "Octavo: tenants",
    "Who uses how much, and how each tenant is served.",
    (*VARIABLES, TENANT),
    {
        "Use": [
            use("Requests", "reqps", "Requests that end per second.", "vllm_requests_total"),
            use(
                "Prompt tokens",
                "suffix:tokens/s",
                "Tokens of prompts per second, those found in the cache too.",
                "vllm:prompt_tokens_total",
            ),
            use("Output tokens", "suffix:tokens/s", "Generated tokens per second.", "vllm:generation_tokens_total"),
        ],
        "Service": [
            Panel(
                "Time to first token, p95",
                "s",
                "95 of 100 requests of the tenant get their first token faster.",
                by_tenant(tenants.quantile(0.95, "vllm:time_to_first_token_seconds", "tenant")),
            ),
            Panel(
                "Found in the cache",
                "percentunit",
                "Share of the tenant's prompt tokens that need not be computed.",
                by_tenant(tenants.ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "tenant")),
                max=1.0,
            ),
            Panel(
                "Aborts and errors",
                "suffix:completions/s",
                "Completions per second that clients aborted, and that failed or timed out.",
                {
                    f"{{{{tenant}}}}: {reason}": named(
                        tenants.rate("vllm:request_success_total", "tenant", finished_reason=reason)
                    )
                    for reason in ("abort", "error")
                },
            ),
        ],
        "In the time range": [
            Panel(
                "Totals",
                "short",
                "What ended or was computed within the time range at the top.",
                {
                    "requests": named(tenants.increase("vllm_requests_total", "tenant")),
                    "prompt tokens": named(tenants.increase("vllm:prompt_tokens_total", "tenant")),
                    "output tokens": named(tenants.increase("vllm:generation_tokens_total", "tenant")),
                },
                "table",
            ),
        ],
    },
)

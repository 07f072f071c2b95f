"""Queries and choices that several dashboards have."""

from ..grafana import Variable
from ..promql import EXPORTED, PromQL
from ..rules import RECORDED

INSTANCE = {"instance": "$instance"}
MODEL = INSTANCE | {"model_name": "$model"}
machine = PromQL("$__rate_interval", INSTANCE, EXPORTED)
q = PromQL("$__rate_interval", MODEL, EXPORTED | RECORDED)
VARIABLES = (
    Variable("instance", "vllm:num_requests_running", "instance"),
    Variable("model", machine.series("vllm:num_requests_running"), "model_name"),
)
ENGINE = ("instance", "model_name", "engine")
BY_ENGINE = "{{instance}} {{model_name}} {{engine}}"


def quantiles(histogram: str) -> dict[str, str]:
    """Return the queries of a panel with the median and the slow end of a histogram."""
    return {f"p{quantile * 100:g}": q.quantile(quantile, histogram) for quantile in (0.5, 0.95, 0.99)}

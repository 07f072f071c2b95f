"""What Prometheus scrapes, records and alerts on.

The objective of the time to the first token is OBJECTIVE of all requests within TTFT_TARGET. Change them here.
"""

from dataclasses import dataclass
from typing import Any

from octavo.frontend.meter import FIRST_TOKEN

from .promql import EXPORTED, PromQL

TTFT_TARGET = 1.0  # seconds; must be the bound of a bucket
OBJECTIVE = 0.99
assert TTFT_TARGET in FIRST_TOKEN

JOB = "octavo"
SLOW = "model:vllm_time_to_first_token_slow:ratio_rate"  # then the window
WAITING = "model:vllm_num_requests_waiting:sum"


@dataclass(frozen=True)
class Record:
    """A series that Prometheus computes from others.

    Attributes:
        name: the labels that are left, the metric, and what is done to it, as Prometheus recommends.
    """

    name: str
    expr: str
    labels: frozenset[str]


@dataclass(frozen=True)
class Alert:
    """Something that a person should look at.

    Attributes:
        lasts: how long `expr` must hold.
        severity: "critical" if users notice it now, otherwise "warning".
        summary: what happens, in a line.
        action: what to do about it.
    """

    name: str
    expr: str
    lasts: str
    severity: str
    summary: str
    action: str


def _slow(window: str) -> Record:
    """Return the share of requests whose first token came too late."""
    q = PromQL(window, {}, EXPORTED)
    name = "vllm:time_to_first_token_seconds"
    in_time = q.rate(f"{name}_bucket", "model_name", le=str(TTFT_TARGET))
    return Record(f"{SLOW}{window}", f"1 - {in_time} / {q.rate(f'{name}_count', 'model_name')}", _MODEL)


_MODEL = frozenset({"model_name"})
_EXPORTED = PromQL("5m", {}, EXPORTED)
RECORDS = [
    *(_slow(window) for window in ("5m", "30m", "1h", "6h")),
    Record(WAITING, _EXPORTED.sum("vllm:num_requests_waiting", "model_name"), _MODEL),
]
RECORDED = {record.name: record.labels for record in RECORDS}


def _burns(long: str, short: str, speed: float) -> str:
    """Return whether the error budget is used `speed` times too fast, in a long window and still in a short one."""
    q, limit = PromQL(short, {}, RECORDED), f"{speed * (1 - OBJECTIVE):.3g}"
    return f"{q.series(SLOW + long)} > {limit} and {q.series(SLOW + short)} > {limit}"


def _swap_rate_climbs() -> str:
    rate = _EXPORTED.series("vllm_kv_cache_swap_rate")
    return f"avg_over_time({rate}[5m]) > 10 and avg_over_time({rate}[5m]) > 2 * avg_over_time({rate}[1h] offset 5m)"


def _queue_grows() -> str:
    waiting = PromQL("10m", {}, RECORDED).series(WAITING)
    return f"{waiting} > 16 and deriv({waiting}[10m]) > 0"


def _kv_full() -> str:
    usage, waiting = _EXPORTED.series("vllm:kv_cache_usage_perc"), _EXPORTED.series("vllm:num_requests_waiting")
    return f"avg_over_time({usage}[5m]) > 0.9 and avg_over_time({waiting}[5m]) > 1"


def _restarts(limit: str) -> str:
    restarts = _EXPORTED.increase("octavo_engine_restarts_total", "instance", "model_name", window="15m")
    return f"{restarts} {limit}"


ALERTS = [
    Alert(
        "OctavoDown", _EXPORTED.series("up", job=JOB) + " == 0", "1m", "critical",
        "{{ $labels.instance }} cannot be scraped.",
        "Look at the server's log. If it runs, check the address, the network and the key of /metrics.",
    ),
    Alert(
        "OctavoEngineRestarted", _restarts("> 0"), "0m", "warning",
        "An engine of {{ $labels.model_name }} on {{ $labels.instance }} has ended unexpectedly and was replaced.",
        "Its requests went on. The server's log has the reason; the kernel's log says if memory ran out.",
    ),
    Alert(
        "OctavoEngineCrashLoop", _restarts(">= 3"), "0m", "critical",
        "Engines of {{ $labels.model_name }} on {{ $labels.instance }} ended 3 times or more in 15 minutes.",
        "Requests wait while an engine loads. Look in the server's log for the reason, or for a request that repeats.",
    ),
    Alert(
        "OctavoTTFTBudgetBurnsFast", _burns("1h", "5m", 14.4), "2m", "critical",
        "First tokens of {{ $labels.model_name }}: {{ $value | humanizePercentage }} took more than "
        f"{TTFT_TARGET:g} s in the last hour.",
        "At this rate, the errors allowed in 30 days are used up in 2. See where the time goes on the overview: if "
        "requests queue, add engines; if prompts are long, look at the cache's hit rate.",
    ),
    Alert(
        "OctavoTTFTBudgetBurns", _burns("6h", "30m", 6.0), "15m", "warning",
        "First tokens of {{ $labels.model_name }}: {{ $value | humanizePercentage }} took more than "
        f"{TTFT_TARGET:g} s in the last 6 hours.",
        "At this rate, the errors allowed in 30 days are used up in 5. See where the time goes on the overview.",
    ),
    Alert(
        "OctavoQueueGrows", _queue_grows(), "10m", "warning",
        "{{ $value }} sequences wait for {{ $labels.model_name }}, and more and more.",
        "Add engines or servers, or limit what clients may send. If engines are not busy, the KV cache is too small.",
    ),
    Alert(
        "OctavoKVCacheFull", _kv_full(), "5m", "warning",
        "The KV cache of engine {{ $labels.engine }} of {{ $labels.model_name }} on {{ $labels.instance }} is full.",
        "Sequences wait for memory, not for the processor. Raise kv_cache_memory, lower max_model_len, or add servers.",
    ),
    Alert(
        "OctavoSwapRateClimbs", _swap_rate_climbs(), "5m", "warning",
        "Engine {{ $labels.engine }} of {{ $labels.model_name }} on {{ $labels.instance }} fetches "
        "{{ $value | humanize }} KV pages a second back into memory, over twice as many as in the hour before.",
        "Memory no longer holds the contexts that are in use. Raise kv_cache_memory, or add servers.",
    ),
]  # fmt: skip


def prometheus_config() -> dict[str, Any]:
    """Return prometheus.yml."""
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": ["recording.yml", "alerts.yml"],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": ["octavo:8000"]}]}],
    }


def recording_rules() -> dict[str, Any]:
    """Return recording.yml."""
    return _group("octavo-recording", [{"record": each.name, "expr": each.expr} for each in RECORDS])


def alert_rules() -> dict[str, Any]:
    """Return alerts.yml."""
    rules = [
        {
            "alert": each.name,
            "expr": each.expr,
            "for": each.lasts,
            "labels": {"severity": each.severity},
            "annotations": {"summary": each.summary, "description": each.action},
        }
        for each in ALERTS
    ]
    return _group("octavo-alerts", rules)


def _group(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"groups": [{"name": name, "rules": rules}]}

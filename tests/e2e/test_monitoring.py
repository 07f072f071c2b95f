"""The dashboards and rules of deploy/monitoring, with the real Prometheus: unit tests of alerts, and a real server."""

import contextlib
import itertools
import json
import math
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from deploy.monitoring.dashboards import DASHBOARDS
from deploy.monitoring.files import files
from deploy.monitoring.grafana import Variable
from deploy.monitoring.promql import EXPORTED, PromQL
from deploy.monitoring.rules import ALERTS, RECORDS
from scrape import Scrape

from fleet_server import until
from programs import program, prometheus
from server_process import ServerProcess

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus"
ENGINE = '{model_name="m", engine="0", instance="a:8000"}'


def test_the_committed_files_are_those_that_are_generated() -> None:
    generated = files()
    for path, text in generated.items():
        assert (ROOT / "deploy" / path).read_text() == text, "run python -m deploy.monitoring"
    folder = ROOT / "deploy/grafana/dashboards"
    assert {f"grafana/dashboards/{path.name}" for path in folder.iterdir()} <= generated.keys()


def test_queries_of_what_does_not_exist_are_refused() -> None:
    q = PromQL("5m", {"tenant": "$tenant"}, EXPORTED)
    assert (
        q.rate("vllm_requests_total", "tenant") == 'sum by (tenant) (rate(vllm_requests_total{tenant=~"$tenant"}[5m]))'
    )
    with pytest.raises(ValueError, match="there is no metric 'vllm:num_request_running'"):
        q.sum("vllm:num_request_running")
    with pytest.raises(ValueError, match="'vllm:num_requests_running' has no label tenant"):
        q.sum("vllm:num_requests_running", "tenant")
    with pytest.raises(ValueError, match="no label reason"):
        q.series("vllm:num_requests_running", reason="capacity")


def test_grafanas_types_know_all_of_a_dashboard() -> None:
    """Reading a dashboard by Grafana's own types, and writing it again, loses nothing."""
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    for dashboard in DASHBOARDS:
        again = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard.json())))
        assert list(differences(dashboard.json(), again)) == [], dashboard.title


def differences(part: Any, whole: Any, path: str = "") -> Iterator[str]:
    """Yield what `part` has and `whole` has not."""
    if isinstance(part, dict) and isinstance(whole, dict):
        for key, value in part.items():
            yield from differences(value, whole.get(key), f"{path}.{key}")
    elif isinstance(part, list) and isinstance(whole, list) and len(part) == len(whole):
        for number, value in enumerate(part):
            yield from differences(value, whole[number], f"{path}[{number}]")
    elif part != whole:
        yield f"{path}: {part!r} became {whole!r}"


def test_panels_are_described_and_do_not_overlap() -> None:
    for dashboard in DASHBOARDS:
        taken = set[tuple[int, int]]()
        for panel in dashboard.json()["panels"]:
            assert panel["type"] == "row" or (panel["description"].endswith(".") and panel["targets"])
            x, y, w, h = (panel["gridPos"][key] for key in "xywh")
            cells = set(itertools.product(range(x, x + w), range(y, y + h)))
            assert x + w <= 24 and not cells & taken
            taken |= cells


def test_each_alert_is_explained_in_the_document() -> None:
    document = (ROOT / "docs/metrics.md").read_text()
    assert re.findall(r"^\| `(Octavo\w+)`", document, re.MULTILINE) == [alert.name for alert in ALERTS]


def slow(name: str, *parts: tuple[int, float]) -> dict[str, str]:
    """Return input series: for `minutes` each, 60 requests a minute, a share of which has a slow first token."""
    labels = 'model_name="m", engine="0", tenant="", instance="a:8000"'
    requests, fast, counts, buckets = 0.0, 0.0, [], []
    for minutes, share in parts:
        for _ in range(minutes):
            requests, fast = requests + 60, fast + 60 * (1 - share)
            counts.append(f"{requests:g}")
            buckets.append(f"{fast:g}")
    return {f"{name}_count{{{labels}}}": " ".join(counts), f'{name}_bucket{{{labels}, le="1.0"}}': " ".join(buckets)}


TTFT = "vllm:time_to_first_token_seconds"
RESTARTS, SWAP = f"octavo_engine_restarts_total{ENGINE}", f"vllm_kv_cache_swap_rate{ENGINE}"
USAGE, WAITING = f"vllm:kv_cache_usage_perc{ENGINE}", f"vllm:num_requests_waiting{ENGINE}"
UP = 'up{job="octavo", instance="a:8000"}'
CASES: list[tuple[str, bool, int, dict[str, str]]] = [
    # The alert, whether it fires, at which minute, and the values of series, one a minute.
    ("OctavoDown", True, 10, {UP: "1x5 0x5"}),
    ("OctavoDown", False, 6, {UP: "1x5 0 1x5"}),
    ("OctavoEngineRestarted", True, 12, {RESTARTS: "0x10 1x30"}),
    ("OctavoEngineRestarted", False, 10, {RESTARTS: "7x20"}),
    ("OctavoEngineRestarted", False, 35, {RESTARTS: "0x10 1x30"}),
    ("OctavoEngineCrashLoop", True, 15, {RESTARTS: "0x10 1 2 3x10"}),
    ("OctavoEngineCrashLoop", False, 15, {RESTARTS: "0x10 1 2x10"}),
    ("OctavoTTFTBudgetBurnsFast", True, 75, slow(TTFT, (80, 0.2))),
    ("OctavoTTFTBudgetBurnsFast", False, 75, slow(TTFT, (80, 0.1))),
    ("OctavoTTFTBudgetBurnsFast", False, 75, slow(TTFT, (60, 0.5), (20, 0.0))),
    ("OctavoTTFTBudgetBurnsFast", False, 75, slow(TTFT, (70, 0.0), (10, 0.3))),
    ("OctavoTTFTBudgetBurns", True, 400, slow(TTFT, (420, 0.1))),
    ("OctavoTTFTBudgetBurns", False, 400, slow(TTFT, (420, 0.05))),
    ("OctavoTTFTBudgetBurns", False, 400, slow(TTFT, (360, 0.2), (60, 0.0))),
    ("OctavoQueueGrows", True, 40, {WAITING: "0+2x50"}),
    ("OctavoQueueGrows", False, 40, {WAITING: "60x50"}),
    ("OctavoQueueGrows", False, 40, {WAITING: "0x30 10x20"}),
    ("OctavoKVCacheFull", True, 40, {USAGE: "0.5x20 0.97x30", WAITING: "0x20 5x30"}),
    ("OctavoKVCacheFull", False, 40, {USAGE: "0.5x20 0.97x30", WAITING: "0x50"}),
    ("OctavoKVCacheFull", False, 40, {USAGE: "0.8x50", WAITING: "5x50"}),
    ("OctavoSwapRateClimbs", True, 72, {SWAP: "0x60 50x30"}),
    ("OctavoSwapRateClimbs", False, 72, {SWAP: "50x90"}),
    ("OctavoSwapRateClimbs", False, 72, {SWAP: "0x60 5x30"}),
]


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    assert {name for name, fires, *_ in CASES if fires} == {alert.name for alert in ALERTS}
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in given.items()],
            "promql_expr_test": [
                {
                    "expr": f'sum by (alertname) (ALERTS{{alertname="{name}", alertstate="firing"}})',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1}] if fires else [],
                }
            ],
        }
        for name, fires, minute, given in CASES
    ]
    rules = [str(RULES / "recording.yml"), str(RULES / "alerts.yml")]
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump({"rule_files": rules, "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run([program("promtool"), "test", "rules", path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_files() -> None:
    command = [program("promtool"), "check", "config", "--lint=all", "--lint-fatal", RULES / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def faster(text: str) -> str:
    """Make each duration of a rule a sixtieth of what it is: an hour takes a minute."""
    milliseconds = {"s": 1000 / 60, "m": 1000, "h": 60_000}
    return re.sub(r"\b(\d+)([smh])\b", lambda found: f"{int(found[1]) * milliseconds[found[2]]:.0f}ms", text)


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose memory has 42 pages of 32 tokens, so that a few long requests swap each other out."""
    disk = str(tmp_path_factory.mktemp("disk") / "pages")
    memory = ("--kv-cache-memory", "1MiB", "--kv-disk", disk, "--preemption", "swap")
    with ServerProcess(tiny_llama, "--enable-metrics", "--access-log", "none", *memory) as server:
        yield server


class Prometheus:
    """A Prometheus that scrapes the server every second."""

    def __init__(self, url: str):
        self._http = httpx.Client(base_url=f"{url}/api/v1", timeout=60)

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return the series of a result whose value is a number."""
        reply = self._http.get("/query", params={"query": expr}).json()
        assert reply["status"] == "success", (expr, reply)
        return [each for each in reply["data"]["result"] if not math.isnan(float(each["value"][1]))]

    def rules(self) -> list[dict[str, Any]]:
        groups = self._http.get("/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def firing(self, name: str) -> list[dict[str, Any]]:
        alerts = self._http.get("/alerts").json()["data"]["alerts"]
        return [each for each in alerts if each["labels"]["alertname"] == name and each["state"] == "firing"]


@pytest.fixture(scope="module")
def scraping(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    for path in RULES.iterdir():
        (folder / path.name).write_text(faster(path.read_text()))
    config = (RULES / "prometheus.yml").read_text().replace("15s", "1s")
    config = config.replace("octavo:8000", server.url.removeprefix("http://"))
    (folder / "prometheus.yml").write_text(config)
    with prometheus(folder / "prometheus.yml") as url:
        yield Prometheus(url)


@contextlib.contextmanager
def load(server: ServerProcess, clients: int, body: Callable[[int], dict[str, Any]]) -> Generator[None]:
    """Send requests all the time, by several clients, for a `with` block."""
    stop, numbers = threading.Event(), itertools.count()

    def client() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not stop.is_set():
                number = next(numbers)
                headers = {"X-Octavo-Tenant": f"tenant {number % 3}"} if number % 3 else {}
                reply = http.post("/v1/completions", json={"model": "tiny", **body(number)}, headers=headers)
                assert reply.status_code == 200

    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(client) for _ in range(clients)]
        try:
            yield
        finally:
            stop.set()
    for each in running:
        each.result()


def small(number: int) -> dict[str, Any]:
    """Return a request whose output repeats itself, so that drafts are accepted."""
    return {
        "prompt": "Once upon a time",
        "max_tokens": 100,
        "temperature": 0,
        "speculative_tokens": 4,
        "ignore_eos": True,
    }


def large(number: int) -> dict[str, Any]:
    """Return a request of 12 pages."""
    prompt = f"Story {number}: " + "once upon a time " * 10
    return {"prompt": prompt, "max_tokens": 300, "seed": number, "ignore_eos": True}


def queries() -> Iterator[tuple[str, str]]:
    """Yield the name and the expression of each panel's query, as Grafana would send it."""
    values = {"$instance": ".*", "$model": ".*", "$tenant": ".*", "$__rate_interval": "5s", "$__range": "60s"}
    for dashboard in DASHBOARDS:
        for panel in dashboard.json()["panels"]:
            for target in panel.get("targets", []):
                expr = target["expr"]
                for name, value in values.items():
                    expr = expr.replace(name, value)
                assert "$" not in expr
                yield f"{dashboard.title}: {panel['title']}: {target['legendFormat']}", expr


def test_the_first_scrape_has_no_swap_rate_yet(server: ServerProcess) -> None:
    def pages_fetched() -> int:
        [model] = httpx.get(f"{server.url}/stats", timeout=60).json()["models"]
        return int(model["replicas"][0]["engine"]["pages_fetched"])

    with load(server, 12, large):
        until(lambda: pages_fetched() > 0)
    scrape = Scrape(server.url)
    assert scrape.sum("octavo_kv_pages_fetched_total") == pages_fetched() > 0
    assert scrape.sum("vllm_kv_cache_swap_rate") == 0


def test_every_panel_and_rule_has_data_under_load(server: ServerProcess, scraping: Prometheus) -> None:
    missing = {**dict(queries()), **{record.name: record.name for record in RECORDS}}
    assert len(missing) > 60

    def all_found() -> bool:
        for name in [name for name, expr in missing.items() if scraping.query(expr)]:
            del missing[name]
        return not missing

    with load(server, 2, small):
        try:
            until(all_found)
        except AssertionError:
            assert not missing
    assert {rule["health"] for rule in scraping.rules()} == {"ok"}
    for variable in {variable for dashboard in DASHBOARDS for variable in dashboard.variables}:
        assert values(scraping, variable) - {""}, variable


def values(scraping: Prometheus, variable: Variable) -> set[str]:
    series = re.sub(r"\$\w+", ".*", variable.series)
    return {each["metric"].get(variable.label, "") for each in scraping.query(series)}


def test_the_swap_alert_fires_when_pages_are_swapped(server: ServerProcess, scraping: Prometheus) -> None:
    until(lambda: bool(scraping.query("count_over_time(vllm_kv_cache_swap_rate[60s]) > 15")))  # a time without swapping
    [before] = scraping.query("vllm:num_preemptions_total")
    assert not scraping.firing("OctavoSwapRateClimbs")
    with load(server, 12, large):
        until(lambda: scraping.firing("OctavoSwapRateClimbs"))
        [rate] = scraping.query("vllm_kv_cache_swap_rate")
        [fetched] = scraping.query("rate(octavo_kv_pages_fetched_total[10s])")
    [alert] = scraping.firing("OctavoSwapRateClimbs")
    assert alert["annotations"]["summary"].startswith(
        f"Engine 0 of tiny on {server.url.removeprefix('http://')} fetches "
    )
    assert float(rate["value"][1]) == pytest.approx(float(fetched["value"][1]), rel=0.5)
    [after] = scraping.query("vllm:num_preemptions_total")
    assert float(after["value"][1]) > float(before["value"][1])


def test_the_alert_for_a_server_that_is_down_fires(server: ServerProcess, scraping: Prometheus) -> None:
    assert not scraping.firing("OctavoDown")
    server.signal(signal.SIGTERM)
    until(lambda: scraping.firing("OctavoDown"))

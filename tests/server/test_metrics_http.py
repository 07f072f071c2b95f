"""GET /metrics, read by prometheus_client's parser: its figures against those that real clients counted."""

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scrape import Scrape

from fleet_server import FleetServer, until
from octavo.server.metrics.catalog import catalog
from server_process import ServerProcess

FIRST_TOKEN = [
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
]
TOKEN = [*(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)]
REQUEST = [
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
]
STEP = [1, *(2**power for power in range(3, 15))]
SIZE = [1, 2, 5, 10, 20, 50, 100, 200, 500]  # up to the model's length of 512
ENGINE = {"model_name", "engine"}
TENANT = ENGINE | {"tenant"}
CACHE = {
    *("num_gpu_blocks", "block_size", "cache_dtype", "gpu_memory_utilization", "enable_prefix_caching"),
    *("prefix_caching_hash_algo", "num_cpu_blocks", "kv_offloading_backend", "kv_offloading_size"),
}
# The names that dashboards query: their type, labels, and the bounds of their buckets. Of counters without "_total".
NAMES: dict[str, tuple[str, set[str], list[float]]] = {
    "vllm_requests": ("counter", TENANT, []),
    "vllm_tokens_generated": ("unknown", TENANT, []),
    "vllm_gpu_utilization_percent": ("gauge", {"device"}, []),
    "vllm_kv_cache_swap_rate": ("gauge", ENGINE, []),
    "vllm:num_requests_running": ("gauge", ENGINE, []),
    "vllm:num_requests_waiting": ("gauge", ENGINE, []),
    "vllm:num_requests_waiting_by_reason": ("gauge", ENGINE | {"reason"}, []),
    "vllm:kv_cache_usage_perc": ("gauge", ENGINE, []),
    "vllm:cache_config_info": ("gauge", ENGINE | CACHE, []),
    "vllm:lora_requests_info": ("gauge", ENGINE | {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}, []),
    "vllm:engine_sleep_state": ("gauge", ENGINE | {"sleep_state"}, []),
    "vllm:num_requests_kv_fetch_by_stage": ("gauge", ENGINE | {"stage"}, []),
    "vllm:request_success": ("counter", TENANT | {"finished_reason"}, []),
    "vllm:prompt_tokens": ("counter", TENANT, []),
    "vllm:generation_tokens": ("counter", TENANT, []),
    "vllm:num_preemptions": ("counter", ENGINE, []),
    "vllm:prefix_cache_hits": ("counter", TENANT, []),
    "vllm:prefix_cache_queries": ("counter", TENANT, []),
    "vllm:external_prefix_cache_hits": ("counter", ENGINE, []),
    "vllm:external_prefix_cache_queries": ("counter", ENGINE, []),
    "vllm:prompt_tokens_cached": ("counter", TENANT, []),
    "vllm:prompt_tokens_by_source": ("counter", TENANT | {"source"}, []),
    "vllm:prompt_tokens_cached_by_source": ("counter", TENANT | {"source"}, []),
    "vllm:estimated_flops_per_gpu": ("counter", ENGINE, []),
    "vllm:estimated_read_bytes_per_gpu": ("counter", ENGINE, []),
    "vllm:estimated_write_bytes_per_gpu": ("counter", ENGINE, []),
    "vllm:spec_decode_num_drafts": ("counter", ENGINE, []),
    "vllm:spec_decode_num_draft_tokens": ("counter", ENGINE, []),
    "vllm:spec_decode_num_accepted_tokens": ("counter", ENGINE, []),
    "vllm:spec_decode_num_accepted_tokens_per_pos": ("counter", ENGINE | {"position"}, []),
    "vllm:time_to_first_token_seconds": ("histogram", TENANT, FIRST_TOKEN),
    "vllm:inter_token_latency_seconds": ("histogram", ENGINE, TOKEN),
    "vllm:request_time_per_output_token_seconds": ("histogram", ENGINE, TOKEN),
    "vllm:e2e_request_latency_seconds": ("histogram", ENGINE, REQUEST),
    "vllm:request_queue_time_seconds": ("histogram", ENGINE, REQUEST),
    "vllm:request_prefill_time_seconds": ("histogram", ENGINE, REQUEST),
    "vllm:request_decode_time_seconds": ("histogram", ENGINE, REQUEST),
    "vllm:request_inference_time_seconds": ("histogram", ENGINE, REQUEST),
    "vllm:iteration_tokens_total": ("histogram", ENGINE, STEP),
    "vllm:request_prompt_tokens": ("histogram", ENGINE, SIZE),
    "vllm:request_generation_tokens": ("histogram", ENGINE, SIZE),
    "vllm:request_max_num_generation_tokens": ("histogram", ENGINE, SIZE),
    "vllm:request_prefill_kv_computed_tokens": ("histogram", ENGINE, SIZE),
    "vllm:request_params_n": ("histogram", ENGINE, [1, 2, 5, 10, 20]),
    "vllm:request_params_max_tokens": ("histogram", ENGINE, SIZE),
    "vllm:request_num_preemptions": ("histogram", ENGINE, [1, 2, 3, 4, 5, 10, 20]),
    "vllm:kv_block_lifetime_seconds": ("histogram", ENGINE, []),
    "vllm:kv_block_idle_before_evict_seconds": ("histogram", ENGINE, []),
    "vllm:kv_block_reuse_gap_seconds": ("histogram", ENGINE, []),
    "vllm:admission_rejections": ("counter", ENGINE | {"reason"}, []),
    "vllm:corrupted_requests": ("counter", ENGINE, []),
    "http_requests": ("counter", {"handler", "method", "status"}, []),
    "http_request_duration_seconds": ("histogram", {"handler", "method"}, [0.1, 0.5, 1]),
    "process_start_time_seconds": ("gauge", set(), []),
    "process_cpu_seconds": ("counter", set(), []),
    "process_resident_memory_bytes": ("gauge", set(), []),
    "process_open_fds": ("gauge", set(), []),
    "process_max_fds": ("gauge", set(), []),
}
DOCUMENT = Path(__file__).parents[2] / "docs/metrics.md"


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--enable-metrics", "--data-parallel-size", "2", "--max-batch-size", "4", "--max-queue", "60")
    folder = str(tmp_path_factory.mktemp("pages"))
    with ServerProcess(tiny_llama, *flags, "--access-log", "none", "--kv-disk", folder) as server:
        yield server


@pytest.fixture(scope="module")
def families(server: ServerProcess) -> dict[str, Any]:
    """The families after a request whose output repeats itself, so that drafts are accepted."""
    assert complete(server, speculative_tokens=4, max_tokens=400, temperature=0, ignore_eos=True).status_code == 200
    return Scrape(server.url).families


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_exported_or_the_document_says_why_not(families: dict[str, Any], name: str) -> None:
    kind, labels, bounds = NAMES[name]
    listed = f"`{name}_total`" if kind == "counter" else f"`{name}`"
    exported, not_exported = DOCUMENT.read_text().split("## Not exported")
    if any(listed in line.split("|")[1] for line in not_exported.splitlines() if line.startswith("|")):
        assert name not in families
        return
    family = families[name]
    assert family.samples
    assert family.type == kind and family.documentation
    for sample in family.samples:
        assert set(sample.labels) - {"le"} == labels, sample
    if bounds:
        first = [each for each in family.samples if each.name.endswith("_bucket")][: len(bounds) + 1]
        assert [float(each.labels["le"]) for each in first] == [*map(float, bounds), float("inf")]
    line = next(line for line in exported.splitlines() if line.startswith(f"| {listed}"))
    assert line.split("|")[2].strip() == {"unknown": "untyped"}.get(kind, kind)


def test_the_document_has_no_name_that_does_not_exist(families: dict[str, Any]) -> None:
    exported = set(re.findall(r"^\| `(\S+)`", DOCUMENT.read_text().split("## Not exported")[0], re.M))
    assert exported == {family.name + "_total" * (family.type == "counter") for family in families.values()}


def test_the_catalog_lists_all_families(families: dict[str, Any]) -> None:
    """Dashboards and alerts are written by it."""
    listed = {each.name: (each.kind, each.help, set(each.labels)) for each in catalog()}
    assert listed.keys() == {family.name + "_total" * (family.type == "counter") for family in families.values()}
    for family in families.values():
        labels = set[str]().union(*(sample.labels.keys() - {"le"} for sample in family.samples))
        kind = {"unknown": "untyped"}.get(family.type, family.type)
        name = family.name + "_total" * (kind == "counter")
        assert listed[name] == (kind, family.documentation, labels)


def test_off_by_default(tiny_llama: Path) -> None:
    with ServerProcess(tiny_llama) as server:
        assert httpx.get(f"{server.url}/metrics").status_code == 404


def complete(server: ServerProcess, path: str = "completions", **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 8} | fields
    if path == "completions":
        body.setdefault("prompt", "Once upon a time")
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)


class Counted:
    """What clients have counted, of all their requests."""

    def __init__(self) -> None:
        self.requests = self.prompt_tokens = self.generated = self.cached = 0
        self.reasons: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, usage: Any, reasons: list[str]) -> None:
        with self._lock:
            self.requests += 1
            self.prompt_tokens += usage.prompt_tokens
            self.generated += usage.completion_tokens
            self.cached += usage.prompt_tokens_details.cached_tokens
            self.reasons.update(reasons)


def one_of_each(client: openai.OpenAI, counted: Counted, number: int) -> None:
    """Send a stream, a request with n = 2, and chats with and without a stream."""
    options: dict[str, Any] = {"model": "tiny", "seed": number, "temperature": 1.0}
    prompt = f"Story {number}: " + "once upon a time " * (number % 4)
    chat: Any = [{"role": "user", "content": prompt}]
    whole = client.completions.create(prompt=prompt, n=2, max_tokens=24, **options)
    counted.add(whole.usage, [choice.finish_reason for choice in whole.choices])
    answer = client.chat.completions.create(messages=chat, max_tokens=16, **options)
    counted.add(answer.usage, [answer.choices[0].finish_reason])
    for stream in (
        client.completions.create(
            prompt=prompt, max_tokens=40, stream=True, stream_options={"include_usage": True}, **options
        ),
        client.chat.completions.create(
            messages=chat, max_tokens=40, stream=True, stream_options={"include_usage": True}, **options
        ),
    ):
        reasons, usage = list[str](), None
        for chunk in stream:
            reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
            usage = chunk.usage or usage
        counted.add(usage, reasons)


def test_figures_are_those_that_clients_counted_although_engines_are_killed(server: ServerProcess) -> None:
    before, counted, stop = Scrape(server.url), Counted(), threading.Event()

    def kill_and_scrape() -> None:
        latest, killed = before, set[int]()
        while len(killed) < 3:
            [model] = httpx.get(f"{server.url}/stats", timeout=60).json()["models"]
            ready = [each["pid"] for each in model["replicas"] if each["is_ready"] and each["pid"] not in killed]
            if ready:
                os.kill(ready[0], signal.SIGKILL)
                killed.add(ready[0])
            for _ in range(5):
                latest, earlier = Scrape(server.url), latest
                latest.grew(earlier)
                stop.wait(0.05)

    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        killing = threads.submit(kill_and_scrape)
        for done in [threads.submit(one_of_each, client, counted, number) for number in range(28)]:
            done.result()
        stop.set()
        killing.result()
    after = Scrape(server.url)
    after.grew(before)

    def increase(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    assert increase("vllm_requests_total") == counted.requests == 4 * 28
    assert increase("vllm_tokens_generated") == increase("vllm:generation_tokens_total") == counted.generated
    assert increase("vllm:prompt_tokens_total") == counted.prompt_tokens
    assert increase("vllm:prompt_tokens_cached_total") == increase("vllm:prefix_cache_hits_total") == counted.cached
    by_source = {source: increase("vllm:prompt_tokens_by_source_total", source=source) for source in SOURCES}
    assert by_source == {"local_cache_hit": counted.cached, "local_compute": counted.prompt_tokens - counted.cached}
    for reason in ("stop", "length", "abort", "error", "repetition"):
        assert increase("vllm:request_success_total", finished_reason=reason) == counted.reasons[reason], reason
    assert increase("vllm:request_generation_tokens_sum") == counted.generated
    assert increase("vllm:request_generation_tokens_count") == counted.reasons.total()
    assert increase("vllm:request_prompt_tokens_sum") == counted.prompt_tokens
    assert increase("vllm:request_prefill_kv_computed_tokens_sum") == counted.prompt_tokens - counted.cached
    assert increase("vllm:request_params_n_sum") == counted.requests + 28
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert increase(f"vllm:{name}_seconds_count") == counted.requests, name
    assert increase("vllm:time_to_first_token_seconds_count") == counted.requests
    parts = ("request_queue_time", "request_prefill_time", "request_decode_time")
    together = sum(increase(f"vllm:{part}_seconds_sum") for part in parts)
    assert together == pytest.approx(increase("vllm:e2e_request_latency_seconds_sum"))
    assert increase("octavo_engine_restarts_total") == 3
    posts = {"method": "POST", "status": "2xx"}
    assert increase("http_requests_total", handler="/v1/completions", **posts) == 2 * 28
    assert increase("http_requests_total", handler="/v1/chat/completions", **posts) == 2 * 28


SOURCES = ("local_compute", "local_cache_hit")


def test_errors_aborts_and_refusals(server: ServerProcess) -> None:
    before = Scrape(server.url)
    assert complete(server, max_tokens=400, ignore_eos=True, timeout=0.01).status_code == 504
    assert complete(server, prompt="").status_code == 400
    assert complete(server, "nothing").status_code == 404
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", timeout=60,
        json={"model": "tiny", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True},
    ) as stream:  # fmt: skip
        next(stream.iter_lines())
    until(lambda: Scrape(server.url).sum("vllm:request_success_total", finished_reason="abort") == 1)
    assert complete(server, n=60, best_of=60, max_tokens=1).status_code == 200
    with ThreadPoolExecutor(3) as threads:
        codes = Counter(threads.map(lambda _: complete(server, n=60, max_tokens=200).status_code, range(3)))
    after = Scrape(server.url)
    reasons = {
        reason: after.sum("vllm:request_success_total", finished_reason=reason)
        - before.sum("vllm:request_success_total", finished_reason=reason)
        for reason in ("abort", "error")
    }
    assert reasons == {"abort": 1, "error": 1}
    assert codes[503] >= 1
    assert after.sum("vllm:admission_rejections_total", reason="max_queue") == codes[503]
    assert after.sum("http_requests_total", handler="none", status="4xx") == 1
    assert after.sum("http_requests_total", handler="/v1/completions", status="4xx") >= 1


def test_latencies_are_within_a_bucket_of_the_clients(server: ServerProcess) -> None:
    before = Scrape(server.url)
    seconds = complete(server, max_tokens=200, ignore_eos=True).elapsed.total_seconds()
    after = Scrape(server.url)
    name = "vllm:e2e_request_latency_seconds"
    measured = after.sum(f"{name}_sum") - before.sum(f"{name}_sum")
    assert seconds - 0.3 < measured <= seconds
    at_least = min(bound for bound in REQUEST if bound >= seconds)
    assert after.bucket(name, at_least) - before.bucket(name, at_least) == 1
    name = "vllm:inter_token_latency_seconds"
    assert after.sum(f"{name}_count") - before.sum(f"{name}_count") == 199
    assert after.sum("vllm:iteration_tokens_total_count") > before.sum("vllm:iteration_tokens_total_count")


def test_tenants_beyond_the_bound_are_counted_together(tiny_llama: Path) -> None:
    with ServerProcess(tiny_llama, "--enable-metrics", "--access-log", "none") as server, httpx.Client() as http:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1, "n": 2}

        def ask(number: int) -> int:
            headers = {"X-Octavo-Tenant": f"tenant {number}"}
            return http.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).status_code

        with ThreadPoolExecutor(4) as threads:
            assert set(threads.map(ask, range(210))) == {200}
        scrape = Scrape(server.url)
        tenants = {each.labels["tenant"] for each in scrape.families["vllm_requests"].samples}
        assert len(tenants) == 202 and {"", "other"} < tenants  # 200 by name
        assert scrape.sum("vllm_requests_total", tenant="other") == 10
        assert scrape.sum("vllm_tokens_generated", tenant="other") == 20
        assert scrape.sum("vllm_tokens_generated") == 420


def test_a_swapped_model_continues_the_counts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    description = {"models": {"m": {"model": str(tiny_model("llama"))}}, "memory": "8GiB"}
    with FleetServer(tmp_path / "fleet", description, "--enable-metrics") as fleet:
        tokens = 0
        for source in (None, "qwen2", "llama"):
            if source:
                before = Scrape(fleet.url)
                reply = fleet.change("swap", "m", model=str(tiny_model(source)))
                assert reply.status_code == 200, reply.text
                tokens += 1  # the new model's first token, computed before it replaces the old one
            tokens += fleet.complete("m").json()["usage"]["completion_tokens"]
            if source:
                Scrape(fleet.url).grew(before)
            assert Scrape(fleet.url).sum("vllm_tokens_generated", model_name="m") == tokens

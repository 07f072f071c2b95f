"""--otlp-endpoint: the spans of a real server, as a collector gets them, checked against what its clients saw."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.command_line import complaint
from tests.support.otlp_receiver import OtlpReceiver, Span
from tests.support.server_process import ServerProcess, free_port

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
QUICKLY = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
BODY = {"model": "tiny", "prompt": [7] * 40, "max_tokens": 9, "ignore_eos": True, "temperature": 0.5, "top_p": 0.9}


@dataclass
class Observed:
    server: ServerProcess
    collector: OtlpReceiver

    def post(self, traceparent: str = "", path: str = "/v1/completions", **changes: Any) -> httpx.Response:
        headers = {"traceparent": traceparent} if traceparent else {}
        return httpx.post(self.server.url + path, json=BODY | changes, headers=headers, timeout=60)

    def of(self, reply: httpx.Response, count: int = 1) -> tuple[Span, list[Span]]:
        """The span of an HTTP request, and `count` spans of the model's requests in it."""
        _, trace, id, _ = reply.headers["traceresponse"].split("-")
        [http] = self.collector.wait(lambda span: (span.trace_id, span.span_id) == (trace, id))
        return http, self.collector.wait(lambda span: span.parent_id == id, count) if count else []


@pytest.fixture(scope="module")
def observed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    data = tmp_path_factory.mktemp("spans")
    with OtlpReceiver() as collector:
        flags = ("--otlp-traces-endpoint", collector.url, "--data-dir", str(data), "--kv-cache-memory", "400KiB")
        with ServerProcess(tiny_llama, *flags, **QUICKLY, OTEL_RESOURCE_ATTRIBUTES="deployment.name=test") as server:
            yield Observed(server, collector)


def test_a_request_joins_its_clients_trace(observed: Observed) -> None:
    before = time.time()
    reply = observed.post(f"00-{TRACE}-{PARENT}-01")
    after = time.time()
    http, [span] = observed.of(reply)
    assert (http.name, http.trace_id, http.parent_id) == ("POST /v1/completions", TRACE, PARENT)
    assert (span.name, span.trace_id, span.kind) == ("llm_request", TRACE, 2)
    assert before <= http.start <= span.start <= span.end <= http.end <= after + 0.01
    assert http.attributes["http.response.status_code"] == 200
    assert http.attributes["octavo.request_id"] == reply.headers["x-request-id"]
    assert (span.resource["service.name"], span.resource["deployment.name"]) == ("octavo", "test")
    assert observed.collector.paths[0] == "/v1/traces"


def test_vllms_attributes(observed: Observed) -> None:
    reply = observed.post()
    _, [span] = observed.of(reply)
    usage, got = reply.json()["usage"], span.attributes
    assert got["gen_ai.request.id"] == reply.json()["id"]
    assert (got["gen_ai.request.n"], got["gen_ai.request.max_tokens"]) == (1, 9)
    assert (got["gen_ai.request.temperature"], got["gen_ai.request.top_p"]) == (0.5, 0.9)
    assert got["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"] == 40
    assert got["gen_ai.usage.completion_tokens"] == usage["completion_tokens"] == 9
    assert (got["gen_ai.response.model"], got["gen_ai.response.finish_reasons"]) == ("tiny", ["length"])
    queued, first, prefill, decode, inference, e2e = (
        got[f"gen_ai.latency.{name}"]
        for name in (
            "time_in_queue", "time_to_first_token", "time_in_model_prefill", "time_in_model_decode",
            "time_in_model_inference", "e2e",
        )
    )  # fmt: skip
    assert 0 <= queued <= first <= e2e
    assert first == pytest.approx(queued + prefill)
    assert inference == pytest.approx(prefill + decode)
    assert e2e == pytest.approx(queued + inference)
    assert e2e == pytest.approx(span.end - span.start, abs=0.05)
    assert [name for name, _, _ in span.events] == ["queued", "admitted", "first token"]
    times = [at for _, at, _ in span.events]
    assert [span.start, *times, span.end] == sorted([span.start, *times, span.end])


def test_the_parent_decides_about_sampling(observed: Observed) -> None:
    unwanted = observed.post("00-11111111111111111111111111111111-2222222222222222-00")
    assert re.fullmatch("00-1{32}-[0-9a-f]{16}-00", unwanted.headers["traceresponse"])
    damaged = observed.post("00-xyz")
    http, _ = observed.of(damaged)  # it starts a trace of its own
    assert http.parent_id == ""
    assert not any(span.trace_id == "1" * 32 for span in observed.collector.wait(lambda span: True))


def test_several_prompts_and_embeddings_and_streams(observed: Observed) -> None:
    _, spans = observed.of(observed.post(prompt=[[5] * 8, [6] * 9], n=2), 2)
    assert sorted(span.attributes["gen_ai.usage.prompt_tokens"] for span in spans) == [8, 9]
    assert {span.attributes["gen_ai.usage.completion_tokens"] for span in spans} == {18}
    url = observed.server.url + "/v1/embeddings"
    observed.of(httpx.post(url, json={"model": "tiny", "input": "a text"}))
    http, [span] = observed.of(observed.post(stream=True))
    assert span.end <= http.end
    assert span.attributes["gen_ai.usage.completion_tokens"] == 9


def test_errors(observed: Observed) -> None:
    http, _ = observed.of(observed.post(max_tokens="many"), 0)
    assert (http.attributes["http.response.status_code"], http.is_error) == (400, False)
    assert http.attributes["error.type"]
    http, [span] = observed.of(observed.post(max_tokens=400, timeout=0.02))
    assert span.is_error
    assert span.attributes["error.type"] == "RequestTimeout"
    assert "timeout of 0.02 seconds" in span.message
    assert http.attributes["http.response.status_code"] == 504


def test_preemptions_and_a_killed_engine_are_events(observed: Observed) -> None:
    replies: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda number=number: replies.append(observed.post(max_tokens=300, seed=number)))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    body = BODY | {"max_tokens": 300, "stream": True}
    with httpx.stream("POST", observed.server.url + "/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        for _ in range(50):
            next(lines)
        os.kill(observed.server.engine_pid(), signal.SIGKILL)
        *_, last = filter(None, lines)
        assert last == "data: [DONE]"
        replies.append(stream)
    for thread in threads:
        thread.join()
    events = [list(observed.of(reply)[1][0].events) for reply in replies]
    names = [[name for name, _, _ in each] for each in events]
    assert any("preempted" in each for each in names)
    lost = next(each for each in names if "engine lost" in each)
    assert lost.index("engine lost") < lost.index("moved") < len(lost) - lost[::-1].index("admitted")
    [reason] = {args["reason"] for each in events for name, _, args in each if name == "engine lost"}
    assert reason == "killed by SIGKILL"


def test_lines_of_a_batch_have_spans(observed: Observed) -> None:
    url = observed.server.url + "/v1"
    line = (
        b'{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": [9, 9], "max_tokens": 2}}'
    )
    file = httpx.post(url + "/files", files={"file": ("in.jsonl", line)}, data={"purpose": "batch"}).json()["id"]
    batch = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    httpx.post(url + "/batches", json=batch).raise_for_status()
    [span] = observed.collector.wait(lambda span: span.attributes.get("gen_ai.request.max_tokens") == 2)
    [http] = observed.collector.wait(lambda http: http.span_id == span.parent_id)
    assert http.parent_id == ""


def observe(server: ServerProcess) -> None:
    reply = httpx.post(server.url + "/v1/completions", json=BODY, timeout=60)
    assert reply.status_code == 200
    assert reply.elapsed.total_seconds() < 2


def test_a_dead_collector_costs_one_warning(tiny_llama: Path) -> None:
    port = free_port()
    with ServerProcess(tiny_llama, "--otlp-endpoint", f"http://127.0.0.1:{port}", **QUICKLY) as server:
        deadline = time.monotonic() + 20
        while "does not take spans" not in server.stderr() and time.monotonic() < deadline:
            observe(server)
        further = time.monotonic() + 1.5  # the exporter gives up after a second, and has failed again by then
        while time.monotonic() < further:
            observe(server)
        with OtlpReceiver(port) as collector:
            httpx.post(server.url + "/v1/completions", json=BODY | {"max_tokens": 3}, timeout=60)
            collector.wait(lambda span: span.attributes.get("gen_ai.request.max_tokens") == 3)
        errors = server.stderr()
    assert errors.count("does not take spans") == 1
    assert f"http://127.0.0.1:{port} does not take spans, which are dropped until it does: " in errors
    assert len(errors.splitlines()) <= 2  # the other one: it takes spans again


def test_wrong_settings_are_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    for wrong in ("localhost:4318", "ftp://localhost", "http://"):
        assert "such as http://localhost:4318" in complaint("serve", tiny_llama, "--otlp-endpoint", wrong)
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("raise ImportError")
    flags = ("--otlp-endpoint", "http://localhost:4318")
    assert "octavo[otel]" in complaint("serve", tiny_llama, *flags, PYTHONPATH=str(tmp_path))


def test_other_servers_do_not_import_opentelemetry() -> None:
    program = (
        "import sys, octavo.server.app, octavo.server.run, octavo.fleet.fleet; print('opentelemetry' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"

"""octavo bench: real runs of the commands, and the load generator against servers that misbehave."""

import asyncio
import json
import random
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import trace_format
from command_line import OCTAVO
from octavo.bench.engine import random_prompts
from octavo.bench.http import Endpoint, measure, send
from octavo.bench.report import SPREADS, RequestTimes, Run, median_run, summarize
from octavo.simulation.trace import read_trace
from octavo.text import Tokenizer
from server_process import ServerProcess


def bench(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """Run `octavo bench`; what its JSON says."""
    file = tmp_path / "report.json"
    command = [*OCTAVO, "bench", *map(str, arguments), "--output-json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, Any] = json.loads(file.read_text())
    assert f"{report['output_tokens_per_second']:,.2f}" in done.stdout  # the table says the same
    assert "Time to first token" in done.stdout
    return report


def complaint(*arguments: object) -> str:
    """The one line on stderr of a benchmark that cannot be run."""
    done = subprocess.run([*OCTAVO, "bench", *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"octavo: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


def check_figures(report: dict[str, Any], requests: int, input_tokens: int, output_tokens: int) -> None:
    """Every figure agrees with what was asked for and with the others."""
    assert (report["completed"], report["failed"]) == (requests, 0)
    assert (report["input_tokens"], report["output_tokens"]) == (input_tokens, output_tokens)
    seconds = report["duration_seconds"]
    assert report["output_tokens_per_second"] == pytest.approx(output_tokens / seconds)
    assert report["total_tokens_per_second"] == pytest.approx((input_tokens + output_tokens) / seconds)
    assert report["requests_per_second"] == pytest.approx(requests / seconds)
    for key in SPREADS:
        assert 0 <= report[key]["p50"] <= report[key]["p90"] <= report[key]["p99"]
    assert 0 < report["time_to_first_token_ms"]["p99"] <= report["request_latency_ms"]["p99"]
    assert report["request_latency_ms"]["p99"] <= seconds * 1000


# The engine by itself


def test_throughput(tiny_llama: Path, tmp_path: Path) -> None:
    shape = ("--num-prompts", 6, "--input-len", 40, "--output-len", 5)
    trace = tmp_path / "trace.json"
    report = bench(tmp_path, "throughput", tiny_llama, *shape, "--repeat", 3, "--threads", 1, "--trace", trace)
    check_figures(report, requests=6, input_tokens=240, output_tokens=30)
    assert report["output_tokens_per_second"] == sorted(report["repeats"])[1]
    assert 0 < report["python_share"] < 1
    assert report["settings"]["engine"]["threads"] == 1
    assert report["settings"]["engine"]["enable_prefix_caching"] is False
    steps = [event["args"] for event in trace_format.parse(trace.read_text()) if event["name"] == "step"]
    assert sum(step["prefill_tokens"] for step in steps) >= 3 * 240


def test_latency(tiny_llama: Path, tmp_path: Path) -> None:
    shape = ("--batch-size", 2, "--iterations", 3, "--input-len", 40, "--output-len", 5)
    report = bench(tmp_path, "latency", tiny_llama, *shape, "--threads", 1)
    check_figures(report, requests=6, input_tokens=240, output_tokens=30)
    # Iterations do not overlap: two requests run at a time.
    assert report["duration_seconds"] * 1000 >= 3 * report["request_latency_ms"]["mean"] * 0.9


def test_random_prompts_are_ordinary_tokens_and_follow_their_seed(tiny_llama: Path) -> None:
    tokenizer = Tokenizer.load(tiny_llama)
    prompts = random_prompts(tokenizer, count=20, length=300, seed=7)
    assert [len(prompt) for prompt in prompts] == [300] * 20
    tokens = {token for prompt in prompts for token in prompt}
    assert tokens.isdisjoint({0, 1, 2})  # tiny_models.SPECIAL_TOKENS
    assert len(tokens) > 400 and max(tokens) < tokenizer.vocab_size
    assert prompts == random_prompts(tokenizer, count=20, length=300, seed=7)
    assert prompts[0] != random_prompts(tokenizer, count=1, length=300, seed=8)[0]


def test_more_tokens_than_the_context_holds(tiny_llama: Path) -> None:
    assert "512" in complaint("throughput", tiny_llama, "--input-len", 500, "--output-len", 13)


def test_a_report_that_cannot_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    shape = ("--num-prompts", 1, "--input-len", 8, "--output-len", 2)
    assert "cannot write" in complaint("throughput", tiny_llama, *shape, "--output-json", tmp_path / "no" / "file")


# A server


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_llama, "--threads", "1") as server:
        yield server


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_serve(server: ServerProcess, tmp_path: Path, endpoint: str) -> None:
    shape = ("--num-prompts", 12, "--concurrency", 4, "--input-len", 8, "--output-len", 6)
    report = bench(tmp_path, "serve", "--base-url", server.url, "--endpoint", endpoint, *shape)
    words = 12 * 8
    assert report["input_tokens"] > words  # counted by the server, in whose small vocabulary a word is several tokens
    check_figures(report, requests=12, input_tokens=report["input_tokens"], output_tokens=12 * 6)
    assert report["settings"]["model"] == "tiny"


def test_request_rate_spreads_requests(server: ServerProcess, tmp_path: Path) -> None:
    shape = ("--num-prompts", 5, "--input-len", 2, "--output-len", 2)
    pace = ("--request-rate", 5, "--seed", 3, "--write-trace", tmp_path / "trace")
    report = bench(tmp_path, "serve", "--base-url", f"{server.url}/v1/", *shape, *pace)
    rng = random.Random(3)
    assert report["duration_seconds"] >= sum(rng.expovariate(5) for _ in range(4))
    trace = read_trace(tmp_path / "trace")  # for octavo simulate
    assert trace[0].at == 0 and trace[-1].at <= report["duration_seconds"]
    assert sum(request.prompt_tokens or 0 for request in trace) == report["input_tokens"]
    assert [request.output_tokens for request in trace] == [2] * 5


def test_serve_where_nothing_listens() -> None:
    assert "http://127.0.0.1:1/v1/models" in complaint("serve", "--base-url", "http://127.0.0.1:1")


def test_serve_with_a_model_that_is_not_there(server: ServerProcess) -> None:
    assert "HTTP 404" in complaint("serve", "--base-url", server.url, "--model", "nobody")
    assert httpx.get(f"{server.url}/health").status_code == 200


# The load generator, against servers made to misbehave


@asynccontextmanager
async def raw_server(*pieces: bytes) -> AsyncIterator[Endpoint]:
    """Answers every connection with `pieces`, each in a packet of its own, then closes it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        yield Endpoint(f"http://127.0.0.1:{port}/v1", "/completions", "m", {}, ignore_eos=True)


async def exchange(*pieces: bytes) -> RequestTimes:
    async with raw_server(*pieces) as endpoint:
        return await send(endpoint, endpoint.body("hello", 3), input_tokens=1)


def stream(*events: object, newline: str = "\n") -> bytes:
    """A whole HTTP answer: the events, then the end of the stream."""
    texts = [json.dumps(event) if isinstance(event, dict) else str(event) for event in events]
    body = "".join(f"data: {text}{newline}{newline}" for text in texts).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body) + body


TEXT = {"choices": [{"index": 0, "text": "é"}]}
DELTA = {"choices": [{"index": 0, "delta": {"content": "é"}}]}
ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_events_arrive_cut_anywhere(newline: str) -> None:
    answer = stream(ROLE, DELTA, TEXT, USAGE, "[DONE]", newline=newline)
    times = asyncio.run(exchange(*(answer[i : i + 1] for i in range(len(answer)))))
    assert times.error is None
    assert (len(times.arrivals), times.input_tokens, times.output_tokens) == (2, 5, 3)
    assert times.sent < times.arrivals[0] < times.arrivals[1]


def test_tokens_are_chunks_where_no_usage_is_given() -> None:
    times = asyncio.run(exchange(stream(TEXT, TEXT, TEXT, "[DONE]")))
    assert (times.error, times.input_tokens, times.output_tokens) == (None, 1, 3)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 8\r\n\r\nslow\ndown", "HTTP 429: slow\ndow"),
        (stream(TEXT)[:-9], "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "HTTP"),
        (stream(TEXT, {"error": {"message": "engine lost"}}), "engine lost"),
        (stream("not json"), "not a completion chunk"),
    ],
)
def test_a_failed_request_says_why(answer: bytes, reason: str) -> None:
    times = asyncio.run(exchange(answer))
    assert times.error and reason in times.error


def test_no_more_requests_at_a_time_than_concurrency() -> None:
    running = most = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await reader.readuntil(b"}")
        for _ in range(20):  # let every other task that may run do so
            await asyncio.sleep(0)
        running -= 1
        writer.write(stream(TEXT, USAGE))
        writer.close()

    async def run() -> Run:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "/completions", "m", {}, ignore_eos=True)
            return await measure(endpoint, ["hello"] * 20, 3, 4, None, 0, lambda _: None)

    result = asyncio.run(run())
    assert summarize(result)["completed"] == 20
    assert most == 4


# The arithmetic


def test_summarize() -> None:
    requests = [
        RequestTimes(sent=10.0, input_tokens=7, output_tokens=3, arrivals=[10.5, 10.6, 10.9]),
        RequestTimes(sent=10.0, input_tokens=5, output_tokens=1, arrivals=[10.7]),
        RequestTimes(sent=10.0, input_tokens=900, output_tokens=1, arrivals=[10.1], error="lost"),
    ]
    summary = summarize(Run(requests, seconds=2.0))
    assert (summary["completed"], summary["failed"]) == (2, 1)
    assert (summary["output_tokens_per_second"], summary["total_tokens_per_second"]) == (2.0, 8.0)
    assert summary["time_to_first_token_ms"]["mean"] == pytest.approx(600)
    assert summary["inter_token_latency_ms"]["mean"] == pytest.approx(200)
    assert summary["inter_token_latency_ms"]["p90"] == pytest.approx(280)
    assert summary["time_per_output_token_ms"]["p50"] == pytest.approx(200)
    assert summary["request_latency_ms"]["p50"] == pytest.approx(800)


def test_every_request_failed() -> None:
    summary = summarize(Run([RequestTimes(sent=0.0, input_tokens=1, error="lost")], seconds=1.0))
    assert (summary["completed"], summary["failed"], summary["output_tokens_per_second"]) == (0, 1, 0)
    assert summary["inter_token_latency_ms"] is None


def test_the_median_run_is_the_one_shown() -> None:
    runs = [Run([RequestTimes(0.0, 1, output, [1.0])], seconds=1.0) for output in (30, 10, 20)]
    assert median_run(runs)["output_tokens"] == 20
    assert median_run(runs)["repeats"] == [10, 20, 30]

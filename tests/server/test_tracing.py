"""--trace: the file of a real server, checked against what its clients saw; octavo trace on it; damaged files."""

import asyncio
import itertools
import json
import os
import signal
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support import trace_format
from tests.support.command_line import answer, complaint
from tests.support.fleet_server import FleetServer, until
from tests.support.server_process import ServerProcess

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError
from octavo.tracing import file as trace_file
from octavo.tracing.file import TraceFile
from octavo.tracing.reading import read_trace

STREAMS, TOKENS, LEN = 8, 120, 64
ENDLESS = {"model": "two", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 128}
Event = dict[str, Any]


@dataclass
class Traced:
    path: Path
    events: list[Event]
    tokens: dict[str, int]  # by request id, as the clients counted
    killed: int  # process id of the engine

    def of_request(self, id: str) -> list[Event]:
        [begin] = [event for event in self.events if event["ph"] == "b" and event["args"]["reply"] == id]
        events = [event for event in self.events if event.get("id2") == begin["id2"]]
        return sorted(events, key=lambda event: event["ts"])


async def stream(http: httpx.AsyncClient, number: int, begun: asyncio.Event) -> tuple[str, int]:
    """The id of a request, and the number of tokens that its client got."""
    body = {
        "model": "tiny", "prompt": [7 + number] * LEN, "max_tokens": TOKENS, "ignore_eos": True, "stream": True,
        "return_token_ids": True,
    }  # fmt: skip
    id, count = "", 0
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        async for text in reply.aiter_lines():
            if text.startswith("data: {"):
                chunk = json.loads(text[6:])
                id = chunk["id"]
                count += sum(len(choice.get("token_ids") or []) for choice in chunk["choices"])
                if count > 4:
                    begun.set()
    return id, count


async def disturbed_streams(server: ServerProcess) -> tuple[dict[str, int], int]:
    begun = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        streams = [asyncio.ensure_future(stream(http, number, begun)) for number in range(STREAMS)]
        await begun.wait()
        os.kill(killed := server.engine_pid(), signal.SIGKILL)
        return dict(await asyncio.gather(*streams)), killed


@pytest.fixture(scope="module")
def traced(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    folder = tmp_path_factory.mktemp("traced")
    path = folder / "trace.json"
    path.write_text("the file of an earlier server")
    flags = ("--kv-cache-memory", "400KiB", "--kv-disk", str(folder / "pages"), "--max-batch-tokens", "48")
    with ServerProcess(tiny_llama, "--trace", str(path), *flags) as server:
        tokens, killed = asyncio.run(disturbed_streams(server))
    events = trace_format.parse(path.read_text())
    return Traced(path, events, tokens, killed)


def test_a_request_has_the_tokens_that_its_client_got(traced: Traced) -> None:
    assert len(traced.tokens) == STREAMS
    for id, count in traced.tokens.items():
        assert count == TOKENS
        life = traced.of_request(id)
        begin, end = life[0], life[-1]
        assert (begin["ph"], end["ph"], begin["name"]) == ("b", "e", end["name"])
        assert begin["args"]["prompt_tokens"] == LEN
        assert (end["args"]["output_tokens"], end["args"]["reason"]) == (count, "length")
        names = [event["name"] for event in life]
        assert names.count("first token") == 1
        assert names.index("sent") < names.index("admitted") < names.index("chunk") < names.index("first token")


def test_a_prompt_is_computed_in_chunks(traced: Traced) -> None:
    """From the last admission before the first token, chunks and cached tokens are the prompt."""
    for id in traced.tokens:
        life, computed = traced.of_request(id), 0
        for event in life:
            if event["name"] == "admitted":
                computed = event["args"]["cached_tokens"]
            elif event["name"] == "chunk":
                computed += event["args"]["tokens"]
                assert event["args"]["tokens"] <= 48
            elif event["name"] == "first token":
                break
        assert computed in (LEN, LEN - 1)  # if one token is left, it is a decode row


def test_steps_of_a_thread_do_not_overlap(traced: Traced) -> None:
    threads: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in traced.events:
        if event["name"] in ("step", "wait for requests"):
            threads[event["pid"], event["tid"]].append(event)
    assert sum(event["name"] == "step" for event in traced.events) > TOKENS
    for slices in threads.values():
        slices.sort(key=lambda event: event["ts"])
        assert all(one["ts"] + one["dur"] <= next["ts"] for one, next in itertools.pairwise(slices))


def test_tokens_of_steps(traced: Traced) -> None:
    """Every chunk of a request is in a step, and every token after a request's first was decoded."""
    steps = [event["args"] for event in traced.events if event["name"] == "step"]
    chunks = sum(event["args"]["tokens"] for event in traced.events if event["name"] == "chunk")
    assert sum(step["prefill_tokens"] for step in steps) == chunks
    assert sum(step["decode_tokens"] for step in steps) >= STREAMS * (TOKENS - 1) - chunks
    parts = {event.get("cat") for event in traced.events if event["ph"] == "X"}
    assert {"host", "swap", "prefill", "decode", "sampling", "idle"} <= parts


def test_a_killed_engine_and_preemptions_are_visible(traced: Traced) -> None:
    [ended] = [event for event in traced.events if event["name"] == "engine ended"]
    assert ended["args"]["engine_pid"] == traced.killed
    assert ended["args"]["reason"] == "killed by SIGKILL"
    ready = [event["args"]["engine_pid"] for event in traced.events if event["name"] == "engine ready"]
    assert ready[0] == traced.killed != ready[1]
    moved = [event for event in traced.events if event["name"] == "moved"]
    assert {event["args"]["engine_pid"] for event in moved} == {ready[1]}
    assert {event["pid"] for event in traced.events if event["name"] == "step"} == set(ready)
    assert any(event["name"] == "preempted" for event in traced.events)
    named = {event["pid"]: event["args"]["name"] for event in traced.events if event["name"] == "process_name"}
    assert {named[pid] for pid in ready} == {"the engine of tiny"}
    saved = [event for event in traced.events if event["name"] == "save page"]
    threads = {event["tid"]: event["args"]["name"] for event in traced.events if event["name"] == "thread_name"}
    assert {threads[event["tid"]] for event in saved} == {"KV transfers"}


def test_a_fleet_whose_server_is_killed(tiny_llama: Path, tmp_path: Path) -> None:
    """Two models, one with two engines of which one is killed, and one that is swapped, while requests go on."""
    path, model = tmp_path / "trace.json", str(tiny_llama)
    description = {"models": {"two": {"model": model, "data_parallel_size": 2}, "one": {"model": model}}}
    server = FleetServer(tmp_path / "fleet", description, "--trace", str(path))
    try:
        server.__enter__()
        for name in ("one", "two", "two"):
            server.complete(name).raise_for_status()
        os.kill(killed := server.engine_pid(), signal.SIGKILL)
        server.change("swap", "one", model=model).raise_for_status()
        server.complete("one", max_tokens=30).raise_for_status()
        running = server.http.build_request("POST", "/v1/completions", json=ENDLESS)
        stream = server.http.send(running, stream=True)
        lines = stream.iter_lines()  # kept, as the request ends with it
        until(lambda: [path.read_text().count(event) for event in ('"first token"', '"ph":"e"')] == [6, 5])
        assert next(lines)
    finally:
        server.process.kill()
        server.process.wait()
        server.http.close()
    events = trace_format.parse(path.read_text(), is_complete=False)
    [ended] = [event for event in events if event["name"] == "engine ended"]
    assert ended["args"]["engine_pid"] == killed
    trace = read_trace(path, 9)
    assert (trace.num_requests, trace.num_unfinished, trace.damaged) == (
        6,
        1,
        0,
    )  # with the one that warms the new model up
    assert sorted((engine.model, engine.number) for engine in trace.engines)[:2] == [("one", 0), ("one", 0)]
    assert {(engine.model, engine.number) for engine in trace.engines} == {("one", 0), ("two", 0), ("two", 1)}


def test_octavo_trace(traced: Traced) -> None:
    text = answer("trace", traced.path, COLUMNS="200")
    preemptions = sum(event["name"] == "preempted" for event in traced.events)
    for id in traced.tokens:
        assert id in text
    assert "engine lost, " in text
    assert "killed by SIGKILL" in text
    assert f"{STREAMS} requests, 0 unfinished" in text
    for part in ("prefill", "decode", "swap", "sampling", "host", "idle"):
        assert part in text
    trace = read_trace(traced.path, STREAMS)
    assert sum(life.counts["preempted"] for life in trace.requests) == preemptions > 0
    assert any(life.parts["preempted"] > 0 for life in trace.requests)
    for engine in trace.engines:
        assert engine.parts.total() == engine.end - engine.begin
        assert min(engine.parts.values()) >= 0
    for life in trace.requests:
        assert life.end is not None
        assert life.parts.total() == life.end - life.begin
        assert min(life.parts.values()) >= 0


def test_a_torn_last_line_is_left_out(traced: Traced, tmp_path: Path) -> None:
    torn = tmp_path / "torn.json"
    whole = traced.path.read_bytes()
    torn.write_bytes(whole[: whole.rindex(b'"e"')])
    text = answer("trace", torn, "--requests", "1", COLUMNS="200")
    assert "1 damaged lines" in text
    assert "1 unfinished" in text


def test_wrong_files_are_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"name": "something else"}')
    assert "no such file" in complaint("trace", tmp_path / "absent.json").lower()
    assert "no trace file of Octavo" in complaint("trace", other)
    other.write_text('[{"name": "octavo"}\n,{"name": "x", "ts": "soon", "ph": "X"}\n,{"name": "y", "ts": 1, "ph": "i"}')
    assert "has events that this version" in complaint("trace", other)
    assert "Is a directory" in complaint("serve", tiny_llama, "--port", "0", "--trace", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path / "pipe", tmp_path / "no" / "such" / "folder.json"):
        with pytest.raises(ConfigError, match="cannot write the trace file"):
            LLM(str(tiny_llama), trace=str(wrong))


def test_python_api(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    llm = LLM(str(tiny_llama), trace=str(path), kv_cache_memory="1MiB")
    [output] = llm.generate([[5, 6, 7]], SamplingParams(n=2, max_tokens=4, ignore_eos=True), use_tqdm=False)
    llm.shutdown()
    [life] = read_trace(path, 2).requests
    assert (life.id, life.output_tokens, life.prompt_tokens) == (output.request_id, 8, 3)
    assert life.counts["admitted"] == 2


def test_a_full_queue_drops_events_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_file, "MAX_QUEUED", 0)
    monkeypatch.setattr(trace_file, "BATCH_SECONDS", 0.0)
    path = tmp_path / "trace.json"
    trace = TraceFile(str(path))
    event = b',{"name":"x","ph":"i","s":"p","pid":1,"tid":1,"ts":1,"args":{}}\n'
    written = 1000
    for _ in range(written):
        trace.write(event)
    trace.close()
    events = json.loads(path.read_text() + "]")
    kept = sum(each["name"] == "x" for each in events)
    assert kept < written
    assert read_trace(path, 0).dropped == written - kept


def test_a_file_is_continued_by_the_process_that_began_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    event = b',{"name":"x","ph":"i","s":"p","pid":1,"tid":1,"ts":1,"args":{}}\n'
    for _ in range(2):  # two models of one server, or one that is swapped
        trace = TraceFile(str(path))
        trace.write(event)
        trace.close()
    assert [each["name"] for each in json.loads(path.read_text() + "]")] == ["octavo", "x", "x"]

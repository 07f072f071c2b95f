"""Parts of /v1/responses: items as messages, events of reasoning and calls, and the store."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from octavo.server.config import ServerConfig
from octavo.server.database import Database
from octavo.server.errors import ApiError
from octavo.server.openai.responses import store as store_module
from octavo.server.openai.responses.body import ResponsesRequest
from octavo.server.openai.responses.builder import ResponseBuilder
from octavo.server.openai.responses.items import chat_messages, input_items, response_of
from octavo.server.openai.responses.objects import ResponseObject
from octavo.server.openai.responses.store import ResponseStore, StoredResponse

CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
EVENTS: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def new_response() -> ResponseObject:
    """A response as a route makes it."""
    return ResponseObject(
        id="resp_00ff", created_at=1, status="in_progress", background=False, instructions=None, max_output_tokens=None,
        max_tool_calls=None, model="tiny", parallel_tool_calls=True, previous_response_id=None, prompt_cache_key=None,
        prompt_cache_retention=None, reasoning={}, safety_identifier=None, store=True, temperature=1.0,
        text={"format": {"type": "text"}}, tool_choice="auto", tools=[], top_logprobs=0, top_p=1.0,
        truncation="disabled", user=None, metadata={}, system_fingerprint="fp",
    )  # fmt: skip


def read(events: bytes) -> list[Any]:
    """Events as the types of the `openai` package, which must have the fields that are sent."""
    found = []
    for event in events.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        found.append(EVENTS.validate_python(content))
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


# Items


def test_a_turn_of_the_model_is_one_message() -> None:
    turn = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see"}]},
        CALL,
        CALL | {"call_id": "call_2"},
        OUTPUT,
        OUTPUT | {"call_id": "call_2", "output": [{"type": "input_text", "text": "rainy"}]},
        {"role": "assistant", "content": "Sunny, or rainy"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more"}]},
    ]
    messages = chat_messages(input_items([{"role": "user", "content": "Weather?"}, *turn], {}))
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert messages == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant", "content": "Let me see", "reasoning_content": "hm",
            "tool_calls": [{"id": f"call_{i}", "type": "function", "function": function} for i in (1, 2)],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": "rainy"},
        {"role": "assistant", "content": "Sunny, or rainy"},
        {"role": "assistant", "content": "No more"},
    ]  # fmt: skip


def test_fields_become_those_of_a_chat() -> None:
    body = {
        "input": "x",
        "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True, "async": False}],
        "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "max_output_tokens": 5,
        "top_k": 3,
    }
    request = ResponsesRequest.from_json(body, ServerConfig())
    function = {"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}
    named = {"type": "function", "function": {"name": "f"}}
    assert request.translated() == {
        "tools": [function],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}},
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}
        },
        "reasoning_effort": "low",
        "max_completion_tokens": 5,
    }  # fmt: skip
    assert (request.sampling, request.summarizes) == ({"top_k": 3}, True)


# Events


@pytest.mark.parametrize("summarize", [False, True])
def test_events_of_reasoning_text_and_calls(summarize: bool) -> None:
    builder = ResponseBuilder(new_response(), summarize)
    parts = [
        builder.begin(),
        builder.add_reasoning("Let me "),
        builder.add_reasoning("think"),
        builder.add_text("Rome "),
        builder.add_text("it is"),
        builder.begin_call("call_1", "weather"),
        builder.add_arguments('{"city": '),
        builder.add_arguments('"Rome"}'),
        builder.begin_call("call_2", "time"),
        builder.add_arguments("{}"),
        builder.end("tool_calls"),
    ]
    events = read(b"".join(parts))
    reasoning, message, weather, clock = events[-1].response.output
    assert [part.text for part in (reasoning.summary if summarize else reasoning.content)] == ["Let me think"]
    assert not (reasoning.content if summarize else reasoning.summary)
    assert message.content[0].text == "Rome it is"
    assert (weather.call_id, weather.name, weather.arguments) == ("call_1", "weather", '{"city": "Rome"}')
    assert (clock.call_id, clock.name, clock.arguments) == ("call_2", "time", "{}")
    assert [event.item for event in events if event.type == "response.output_item.done"] == events[-1].response.output
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [event.output_index for event in added] == [0, 1, 2, 3]
    assert {event.item.status for event in added} == {"in_progress"}
    assert {item.status for item in events[-1].response.output} == {"completed"}
    assert {response_of(item.id) for item in events[-1].response.output} == {"resp_00ff"}
    kinds = [event.type.removeprefix("response.") for event in events]
    text = "reasoning_summary_text" if summarize else "reasoning_text"
    part = "reasoning_summary_part" if summarize else "content_part"
    assert kinds[2:9] == [
        *("output_item.added", f"{part}.added", f"{text}.delta", f"{text}.delta"),
        *(f"{text}.done", f"{part}.done", "output_item.done"),
    ]
    arguments = "function_call_arguments"
    assert kinds[-10:] == [
        *("output_item.added", f"{arguments}.delta", f"{arguments}.delta", f"{arguments}.done", "output_item.done"),
        *("output_item.added", f"{arguments}.delta", f"{arguments}.done", "output_item.done", "completed"),
    ]


def test_a_failure_ends_the_stream_with_an_error() -> None:
    builder = ResponseBuilder(new_response())
    *_, error, failed = read(builder.begin() + builder.add_text("Ro") + builder.fail("engine_dead", "it stopped"))
    assert (error.type, error.code, error.message) == ("error", "engine_dead", "it stopped")
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    [message] = failed.response.output
    assert (failed.response.error.message, message.content[0].text) == ("it stopped", "Ro")
    assert message.status == "incomplete"


# The store


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that the store reads, which passes by a second for each reading."""
    now = [1e9]

    def time() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(store_module.time, "time", time)
    yield now


def stored(id: str, tenant: str = "", previous: str | None = None, status: str = "completed", text: str = "") -> Any:
    response = {"id": id, "status": status, "output": [{"id": f"msg_{id}", "text": text}]}
    return StoredResponse(id, tenant, previous, status, [{"id": f"in_{id}"}], response, b"events")


def test_conversations_of_tenants() -> None:
    async def use() -> None:
        store = ResponseStore(Database(None))
        for each in (stored("a"), stored("b", previous="a"), stored("c", previous="b"), stored("a2", "other", "c")):
            await store.put(each)
        assert [turn.id for turn in await store.conversation("c", "")] == ["a", "b", "c"]
        assert [item["id"] for item in (await store.conversation("b", ""))[1].items] == ["in_b", "msg_b"]
        assert await store.find("b", "") == stored("b", previous="a")
        assert await store.find("b", "other") is None
        assert not await store.delete("b", "other") and await store.delete("b", "")
        for id, tenant in (("c", ""), ("a2", "other"), ("unknown", "")):
            with pytest.raises(ApiError) as error:
                await store.conversation(id, tenant)
            assert error.value.status == 404
        store.database.close()

    asyncio.run(use())


def test_limits_of_the_store(clock: list[float]) -> None:
    async def use() -> None:
        store = ResponseStore(Database(None), limits=(4, 10_000))
        await store.put(stored("small", "modest"))
        for i in range(5):  # one tenant cannot displace another one
            await store.put(stored(str(i), "greedy"))
        assert [bool(await store.find(str(i), "greedy")) for i in range(5)] == [False, False, True, True, True]
        await store.put(stored("1", "greedy", previous=None))
        await store.conversation("3", "greedy")  # used
        await store.put(stored("5", "greedy"))
        assert [bool(await store.find(str(i), "greedy")) for i in (3, 4, 1, 5)] == [True, False, True, True]
        await store.put(stored("large", "greedy", text="x" * 8000))
        assert await store.find("small", "modest") and await store.find("large", "greedy")
        await store.put(stored("larger", "greedy", text="x" * 8000))
        assert await store.find("small", "modest") and await store.find("large", "greedy") is None
        clock[0] += store_module.MAX_AGE
        await store.put(stored("new"))
        assert await store.find("small", "modest") is None and await store.find("new", "")
        store.database.close()

    asyncio.run(use())


def test_what_a_store_on_disk_remembers(tmp_path: Path) -> None:
    async def use() -> None:
        store = ResponseStore(Database(tmp_path / "octavo.db"))
        await store.put(stored("a", text="漢字 \x00 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")))
        await store.put(stored("b", status="queued"))
        await store.put(stored("b", status="in_progress"))
        before = await store.find("a", "")
        store.database.close()
        store = ResponseStore(Database(tmp_path / "octavo.db"), limits=(2, 10**6))
        assert await store.find("a", "") == before
        interrupted = await store.find("b", "")
        assert interrupted and (interrupted.status, interrupted.response["status"]) == ("failed", "failed")
        assert "server stopped" in interrupted.response["error"]["message"]
        await store.put(stored("c"))  # what was stored before counts
        assert [bool(await store.find(id, "")) for id in "abc"].count(True) == 2
        store.database.close()

    asyncio.run(use())

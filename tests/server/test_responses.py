"""/v1/responses of a real server, as the real `openai` client sees it."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from octavo import AsyncLLM
from octavo.errors import ConfigError
from octavo.fleet.fleet import Fleet
from octavo.server.app import create_app
from octavo.server.database import DATABASE, Database
from octavo.server.openai.chat_generation import ChatGeneration
from octavo.server.openai.responses.store import ResponseStore, StoredResponse
from octavo.text.answer import ArgumentsDelta, ReasoningDelta, TextDelta, ToolCallStart
from server_process import ServerProcess

HELLO = "Say hello to the modules"
LONG = " ".join(f"The module number {i} defines functions." for i in range(8))  # some pages of the KV cache
EXACT: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
ENDLESS: dict[str, Any] = {"max_output_tokens": 400, **EXACT}


def create(client: openai.OpenAI, input: Any = HELLO, **options: Any) -> Any:
    return client.responses.create(**{"model": "tiny", "input": input, "max_output_tokens": 8, **EXACT, **options})


def chat(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    fields = {"model": "tiny", "messages": messages, "max_tokens": 8, **EXACT, **options}
    return client.chat.completions.create(**fields)


def ended(client: openai.OpenAI, id: str) -> Response:
    """Poll a background response until it has ended."""
    deadline = time.monotonic() + 30
    while (response := client.responses.retrieve(id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return response


def client_of(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def running(server: ServerProcess) -> int:
    stats = httpx.get(f"{server.url}/stats").json()
    return int(stats["models"][0]["engine"]["running"] if "models" in stats else stats["running"])


# Whole responses


def test_a_response_is_the_answer_of_a_chat(client: openai.OpenAI) -> None:
    response = create(client, instructions="Be brief", metadata={"key": "value"}, user="someone")
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": HELLO}]
    same = chat(client, messages)
    assert response.output_text == same.choices[0].message.content
    assert (response.usage.input_tokens, response.usage.output_tokens) == (same.usage.prompt_tokens, 8)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert (response.instructions, response.metadata, response.user) == ("Be brief", {"key": "value"}, "someone")
    assert (response.temperature, response.max_output_tokens, response.text.format.type) == (0, 8, "text")
    assert client.responses.retrieve(response.id) == response


def test_a_response_that_ends_by_itself_is_complete(client: openai.OpenAI) -> None:
    text = create(client, max_output_tokens=24).output_text
    stop = text[5:8]
    response = create(client, max_output_tokens=24, extra_body={"stop": stop})
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert response.output_text == text[: text.index(stop)]
    assert response.output[0].status == "completed"
    assert response.completed_at >= response.created_at


def test_an_empty_answer_has_a_message(client: openai.OpenAI) -> None:
    response = create(client, extra_body={"logit_bias": {"2": 100}})  # the end of sequence
    assert (response.status, response.output_text, len(response.output)) == ("completed", "", 1)


def test_forms_of_input(client: openai.OpenAI) -> None:
    parts = [{"type": "input_text", "text": HELLO}]
    forms = [
        [{"role": "user", "content": HELLO}],
        [{"type": "message", "role": "user", "content": parts}],
    ]
    assert {create(client, form).output_text for form in forms} == {create(client).output_text}
    turns = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]
    same = [
        {"role": role, "content": text}
        for role, text in zip(["system", "user", "assistant", "user"], ["Be brief", *"abc"], strict=True)
    ]
    assert create(client, turns).output_text == chat(client, same).choices[0].message.content


def test_logprobs(client: openai.OpenAI) -> None:
    response = create(client, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = response.output[0].content[0].logprobs
    same = chat(client, [{"role": "user", "content": HELLO}], logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [(one.token, one.logprob) for one in logprobs] == [(one.token, one.logprob) for one in same]
    assert [len(one.top_logprobs) for one in logprobs] == [2] * 8
    deltas = [
        event for event in create(client, stream=True, top_logprobs=1) if event.type == "response.output_text.delta"
    ]
    assert [one.token for event in deltas for one in event.logprobs] == [one.token for one in same]
    assert create(client).output[0].content[0].logprobs == []


def test_the_async_client(server: ServerProcess, client: openai.OpenAI) -> None:
    async def use() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole = await client.responses.create(model="tiny", input=HELLO, max_output_tokens=8, **EXACT)
            streamed = await client.responses.create(
                model="tiny", input=HELLO, max_output_tokens=8, stream=True, **EXACT
            )
            text = [event.delta async for event in streamed if event.type == "response.output_text.delta"]
        return whole.output_text, "".join(text)

    whole, streamed = asyncio.run(use())
    assert whole == streamed == create(client).output_text


# Streams


def test_events_of_a_stream(client: openai.OpenAI) -> None:
    events = list(create(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert events[0].response.output == [] and events[0].response.status == "in_progress"
    text = "".join(event.delta for event in events[4 : 4 + deltas])
    final = events[-1].response
    assert text == events[-4].text == final.output_text == create(client).output_text
    assert {event.item_id for event in events[3:-2]} == {final.output[0].id}
    assert (final.status, final.usage.output_tokens) == ("incomplete", 8)
    assert client.responses.retrieve(final.id) == final


def test_the_stream_helper(client: openai.OpenAI) -> None:
    text = create(client, max_output_tokens=24).output_text
    stop = {"extra_body": {"stop": text[5:8]}, "temperature": 0}
    with client.responses.stream(model="tiny", input=HELLO, max_output_tokens=24, **stop) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == text[: text.index(text[5:8])]
    assert final.status == "completed"


def test_a_request_that_fails_at_once_gets_a_status_not_a_stream(client: openai.OpenAI) -> None:
    for options in ({"input": "word " * 600}, {"model": "other"}):
        with pytest.raises(openai.APIStatusError):
            create(client, **{"stream": True, **options})


def test_a_client_that_leaves_a_stream_ends_it(server: ServerProcess, client: openai.OpenAI) -> None:
    stream = client.responses.create(model="tiny", input=HELLO, stream=True, **ENDLESS)
    id = next(iter(stream)).response.id
    stream.close()
    deadline = time.monotonic() + 10
    while running(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(id)


# Conversations


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    first = create(client, LONG, instructions="Be brief")
    second = create(client, "And then?", previous_response_id=first.id)
    third = create(client, "And then?", previous_response_id=second.id)
    said: list[Any] = [{"role": "user", "content": LONG}]  # instructions are not carried over
    for response in (first, second):
        said += [{"role": "assistant", "content": response.output_text}, {"role": "user", "content": "And then?"}]
    assert third.output_text == chat(client, said).choices[0].message.content
    assert third.usage.input_tokens_details.cached_tokens > second.usage.input_tokens_details.cached_tokens
    assert third.previous_response_id == second.id

    items = list(client.responses.input_items.list(third.id, order="asc", limit=2))  # in three pages
    assert [item.content[0].text for item in items] == [message["content"] for message in said]
    newest = client.responses.input_items.list(third.id, limit=1)
    assert (newest.data, newest.has_more) == (items[-1:], True)

    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as error:
        create(client, "And then?", previous_response_id=third.id)
    assert error.value.code == "previous_response_not_found"


def test_items_can_be_named_by_their_ids(client: openai.OpenAI) -> None:
    first = create(client)
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    named = create(client, [{"role": "user", "content": HELLO}, reference, {"role": "user", "content": "more"}])
    assert named.output_text == create(client, "more", previous_response_id=first.id).output_text
    with pytest.raises(openai.NotFoundError):
        create(client, [reference | {"id": reference["id"][:-1] + "7"}])


def test_truncation(client: openai.OpenAI) -> None:
    turns = [{"role": role, "content": f"{i} " + "word " * 30} for i in range(8) for role in ("user", "assistant")]
    turns.append({"role": "user", "content": "the last"})
    with pytest.raises(openai.BadRequestError) as error:
        create(client, turns)
    assert error.value.code == "context_length_exceeded"
    response = create(client, turns, truncation="auto", instructions="Be brief")
    for start in range(2, len(turns), 2):  # the first turn of the longest part that fits
        try:
            whole = create(client, turns[start:], instructions="Be brief", max_output_tokens=16)
        except openai.BadRequestError:
            continue
        assert start > 2 and response.usage.input_tokens == whole.usage.input_tokens
        assert whole.output_text.startswith(response.output_text)
        break
    with pytest.raises(openai.BadRequestError):
        create(client, "word " * 600, truncation="auto")


def uses(client: openai.OpenAI) -> list[Any]:
    """Return the methods that take the id of a stored response."""
    responses = client.responses
    return [responses.retrieve, responses.delete, responses.cancel, responses.input_items.list]


def test_what_is_not_stored_or_was_deleted(client: openai.OpenAI) -> None:
    kept, deleted = create(client, store=False), create(client)
    assert (kept.model_extra or {})["store"] is False
    client.responses.delete(deleted.id)
    for id in (kept.id, deleted.id, "resp_unknown", "x" * 3000):
        for use in uses(client):
            with pytest.raises(openai.NotFoundError):
                use(id)


def test_a_tenant_sees_only_its_own_responses(client: openai.OpenAI) -> None:
    one, other = {"X-Octavo-Tenant": "one"}, {"X-Octavo-Tenant": "other"}
    id = create(client, extra_headers=one, background=True).id
    for headers in (other, {}):
        for use in uses(client):
            with pytest.raises(openai.NotFoundError):
                use(id, extra_headers=headers)
        with pytest.raises(openai.NotFoundError):
            create(client, previous_response_id=id, extra_headers=headers)
    assert client.responses.retrieve(id, extra_headers=one).id == id


def test_input_tokens(client: openai.OpenAI) -> None:
    count = client.responses.input_tokens.count(model="tiny", input=HELLO, instructions="Be brief")
    assert count.input_tokens == create(client, instructions="Be brief").usage.input_tokens
    assert count.object == "response.input_tokens"


# In the background


def test_in_the_background(client: openai.OpenAI) -> None:
    response = create(client, background=True)
    assert (response.status, response.background, response.output) == ("queued", True, [])
    done = ended(client, response.id)
    assert (done.status, done.output_text) == ("incomplete", create(client).output_text)
    assert client.responses.cancel(response.id) == done  # too late: it stays as it is
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(create(client).id)


def test_cancelling(server: ServerProcess, client: openai.OpenAI) -> None:
    response = client.responses.create(model="tiny", input=HELLO, background=True, **ENDLESS)
    with pytest.raises(openai.BadRequestError):
        create(client, previous_response_id=response.id)  # not complete
    assert client.responses.cancel(response.id).status == "cancelled"
    assert client.responses.retrieve(response.id).status == "cancelled"
    assert running(server) == 0
    other = client.responses.create(model="tiny", input=HELLO, background=True, **ENDLESS)
    client.responses.delete(other.id)
    assert running(server) == 0


def test_a_background_stream_goes_on_without_its_client(client: openai.OpenAI) -> None:
    stream = client.responses.create(model="tiny", input=HELLO, background=True, stream=True, **ENDLESS)
    first = [event for event, _ in zip(stream, range(6), strict=False)]
    stream.close()
    id, last = first[0].response.id, first[-1].sequence_number
    rest = list(client.responses.retrieve(id, stream=True, starting_after=last))
    events = first + rest
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    final = events[-1].response
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text
    assert final.usage.output_tokens == 400
    assert list(client.responses.retrieve(id, stream=True)) == events  # from the store
    assert client.responses.retrieve(id) == final
    with pytest.raises(openai.BadRequestError):
        client.responses.retrieve(create(client).id, stream=True)


def test_a_data_folder_survives_the_server(tiny_llama: Path, tmp_path: Path) -> None:
    """A server that drains waits for background responses; at the end of its drain timeout they fail."""
    flags, path = ("--data-dir", str(tmp_path / "data")), tmp_path / "data" / DATABASE
    with ServerProcess(tiny_llama, *flags) as server, client_of(server) as client:
        first = create(client, HELLO)
        waiting = client.responses.create(model="tiny", input=HELLO, background=True, **ENDLESS)
    one_at_a_time = ("--drain-timeout", "0", "--max-batch-size", "1")
    with ServerProcess(tiny_llama, *flags, *one_at_a_time) as server, client_of(server) as client:
        assert client.responses.retrieve(first.id) == first
        assert client.responses.retrieve(waiting.id).usage.output_tokens == 400
        assert create(client, "more", previous_response_id=first.id).previous_response_id == first.id
        with pytest.raises(ConfigError, match="another server"):
            Database(path)
        ids = [client.responses.create(model="tiny", input=HELLO, background=True, **ENDLESS).id for _ in range(40)]

    async def end_of(id: str) -> StoredResponse | None:
        return await store.find(id, "")

    store = ResponseStore(Database(path))
    found = [asyncio.run(end_of(id)) for id in ids]
    store.database.close()
    assert {stored.status for stored in found if stored} <= {"incomplete", "failed"} and all(found)
    assert found[-1] and found[-1].status == "failed"
    assert "shutting down" in found[-1].response["error"]["message"]


def test_a_data_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data_dir cannot be used"):
        Database(tmp_path / "file" / DATABASE)
    (tmp_path / DATABASE).write_text("not a database " * 100)
    with pytest.raises(ConfigError, match="data_dir cannot be used"):
        Database(tmp_path / DATABASE)


# What is refused


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["text"]}, "input[0]"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "x"}] * 3000}, "input"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "x", "max_tokens": 5}, "max_tokens"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "n": 2}, "n"),
        ({"input": "x", "temperature": -1}, "temperature"),
        ({"input": "x", "not_a_field": 1}, "not_a_field"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"input": "x", "background": True, "store": False}, "background"),
        ({"input": "x", "metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"input": "x", "stream_options": {"include": True}}, "stream_options.include"),
        ({"input": "word " * 600}, "input"),
    ],
)
def test_what_is_refused(server: ServerProcess, body: dict[str, Any], param: str) -> None:
    reply = httpx.post(f"{server.url}/v1/responses", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert re.split(r"\W", param)[0] in error["message"] or param == "input"


def test_hints_are_accepted(client: openai.OpenAI) -> None:
    hints: Any = {
        "service_tier": "auto", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "max_tool_calls": 3,
        "include": ["reasoning.encrypted_content"], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "truncation": "disabled", "text": {"format": {"type": "text"}, "verbosity": "medium"}, "safety_identifier": "s",
    }  # fmt: skip
    response = create(client, **hints)
    assert response.output_text == create(client).output_text
    assert (response.service_tier, response.prompt_cache_key, response.max_tool_calls) == ("default", "k", 3)


def test_wrong_queries(server: ServerProcess, client: openai.OpenAI) -> None:
    url = f"{server.url}/v1/responses/{create(client).id}"
    for query in ("limit=0", "limit=101", "limit=x", "order=up"):
        assert httpx.get(f"{url}/input_items?{query}").status_code == 400
    assert httpx.get(f"{url}/input_items?after=unknown").status_code == 404
    assert httpx.get(f"{url}?stream=true&starting_after=x").status_code == 400


def test_a_model_is_in_use_until_its_background_response_has_ended(tiny_llama: Path) -> None:
    async def use() -> None:
        async with AsyncLLM(str(tiny_llama)) as llm:
            fleet = Fleet.of(llm)
            transport = httpx.ASGITransport(create_app(fleet))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                body = {"input": HELLO, "background": True, "ignore_eos": True, "max_output_tokens": 400}
                id = (await client.post("/v1/responses", json=body)).json()["id"]
                assert not fleet.default.is_idle
                assert (await client.post(f"/v1/responses/{id}/cancel")).json()["status"] == "cancelled"
                assert fleet.default.is_idle
                for truncation in ("auto", "disabled"):
                    reply = await client.post("/v1/responses", json={"input": HELLO, "truncation": truncation})
                    assert reply.status_code == 200 and fleet.default.is_idle

    asyncio.run(use())


def test_reasoning_and_calls_of_functions(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parts of an answer as a parser of the model's text makes them."""
    parts = [
        ReasoningDelta("Let me see"),
        TextDelta("I look it up."),
        ToolCallStart(0, "call_1", "weather"),
        ArgumentsDelta(0, '{"city": "Rome"}'),
    ]
    monkeypatch.setattr(ChatGeneration, "events", lambda _, new: [parts.pop(0)] if new.text and parts else [])
    monkeypatch.setattr(ChatGeneration, "finish_reason", lambda _, new: new.finish_reason and "tool_calls")

    async def use() -> tuple[Any, list[Any]]:
        async with AsyncLLM(str(tiny_llama)) as llm:
            transport = httpx.ASGITransport(create_app(Fleet.of(llm)))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                body = {"input": HELLO, "ignore_eos": True, "max_output_tokens": 40, "top_logprobs": 1}
                reply = (await client.post("/v1/responses", json=body)).json()
                url = f"/v1/responses/{reply['id']}"
                assert (await client.get(url)).json() == reply
                items = (await client.get(f"{url}/input_items")).json()["data"]
        return reply, items

    reply, items = asyncio.run(use())
    reasoning, message, call = reply["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me see"}]
    assert message["content"][0]["text"] == "I look it up."
    assert 0 < len(message["content"][0]["logprobs"]) < 5  # those of the reasoning and the call are left out
    assert (call["type"], call["call_id"], call["name"]) == ("function_call", "call_1", "weather")
    assert (call["arguments"], reply["status"]) == ('{"city": "Rome"}', "completed")
    assert [item["content"][0]["text"] for item in items] == [HELLO]

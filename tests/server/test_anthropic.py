"""POST /v1/messages as the real `anthropic` client sees it."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from octavo.server.anthropic.answer import BlockEvents, content_blocks
from octavo.text.answer import Answer, AnswerEvent, ArgumentsDelta, ReasoningDelta, TextDelta, ToolCallStart
from server_process import ServerProcess

HELLO: Any = [{"role": "user", "content": "Say hello to the modules"}]
GREEDY: Any = {"model": "tiny", "max_tokens": 8, "extra_body": {"temperature": 0, "ignore_eos": True}}


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat_text(server: ServerProcess, messages: Any, **options: Any) -> Any:
    """The same chat by OpenAI's route."""
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **options}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()


def test_a_message(claude: anthropic.Anthropic, server: ServerProcess) -> None:
    reply = claude.messages.create(messages=HELLO, **GREEDY)
    expected = chat_text(server, HELLO)
    assert [block.type for block in reply.content] == ["text"]
    assert reply.content[0].text == expected["choices"][0]["message"]["content"]  # type: ignore[union-attr]
    assert (reply.model, reply.role, reply.stop_reason) == ("tiny", "assistant", "max_tokens")
    usage = reply.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == expected["usage"]["prompt_tokens"]
    assert usage.output_tokens == 8
    assert reply._request_id


def test_system_blocks_prefill_and_user(claude: anthropic.Anthropic, server: ServerProcess) -> None:
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm", "signature": "s"},
                                          {"type": "text", "text": "The module"}]},
    ]  # fmt: skip
    reply = claude.messages.create(system=system, messages=turns, metadata={"user_id": "u"}, **GREEDY)
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
             {"role": "assistant", "content": "The module"}]  # fmt: skip
    expected = chat_text(server, plain, continue_final_message=True, add_generation_prompt=False)
    assert reply.content[0].text == expected["choices"][0]["message"]["content"]  # type: ignore[union-attr]


def test_stream_and_stop_sequence(claude: anthropic.Anthropic) -> None:
    text = claude.messages.create(messages=HELLO, **GREEDY | {"max_tokens": 24}).content[0].text  # type: ignore[union-attr]
    stop = text[5:8]
    options = GREEDY | {"max_tokens": 24, "stop_sequences": [stop]}
    with claude.messages.stream(messages=HELLO, **options) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert final.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    assert final.usage.output_tokens > 0
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_count_tokens(claude: anthropic.Anthropic, server: ServerProcess) -> None:
    count = claude.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.").input_tokens
    expected = chat_text(server, [{"role": "system", "content": "Be brief."}, *HELLO])
    assert count == expected["usage"]["prompt_tokens"]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}


@pytest.mark.parametrize(
    "change, status, kind, words",
    [
        ({"model": "other"}, 404, "not_found_error", "other"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "invalid_request_error", "image"),
        ({"messages": [{"role": "user", "content": [5]}]}, 400, "invalid_request_error", "content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_request_error", "content"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]},
            400,
            "invalid_request_error",
            "name",
        ),
        ({"n": 2}, 400, "invalid_request_error", "n"),
        ({"max_token": 2}, 400, "invalid_request_error", "unknown field max_token"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
        ({"thinking": {"type": "much"}}, 400, "invalid_request_error", "thinking"),
    ],
)
def test_errors_have_anthropics_form(
    server: ServerProcess, change: dict[str, Any], status: int, kind: str, words: str
) -> None:
    for stream in (False, True):
        body = {"model": "tiny", "max_tokens": 4, "messages": HELLO, "stream": stream} | change
        reply = httpx.post(f"{server.url}/v1/messages", json=body)
        error = reply.json()
        assert (reply.status_code, error["type"], error["error"]["type"]) == (status, "error", kind)
        assert words in error["error"]["message"]
        assert reply.headers["request-id"] == reply.headers["x-request-id"]


def test_errors_of_the_edge_have_anthropics_form(server: ServerProcess) -> None:
    url = f"{server.url}/v1/messages"
    json = {"content-type": "application/json"}
    replies = [
        (httpx.post(url, content=b"{", headers=json), 400, "invalid_request_error"),
        (httpx.post(url, content=b"x" * (9 << 20), headers=json), 413, "request_too_large"),
        (httpx.get(url), 405, "invalid_request_error"),
        (httpx.post(url, content=b"{}"), 415, "invalid_request_error"),
    ]
    for reply, status, kind in replies:
        assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)


def test_blocks_of_reasoning_text_and_calls() -> None:
    """The events of a stream add up to the whole answer's blocks."""
    parts: list[AnswerEvent] = [
        ReasoningDelta("Let me "), ReasoningDelta("see."), TextDelta("I "), TextDelta("look."),
        ToolCallStart(0, "call_1", "look"), ArgumentsDelta(0, '{"at": '), ArgumentsDelta(0, '"it"}'),
        ToolCallStart(1, "call_2", "rest"),
    ]  # fmt: skip
    answer, stream = Answer(), BlockEvents()
    answer.add(parts)
    encoded = b"".join([stream.add(part) for part in parts] + [stream.end()]).decode()
    kinds = [line[7:] for line in encoded.splitlines() if line.startswith("event: ")]
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert kinds == [start, delta, delta, stop, start, delta, delta, stop, start, delta, delta, stop, start, stop]
    assert content_blocks(answer) == [
        {"type": "thinking", "thinking": "Let me see.", "signature": ""},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "call_1", "name": "look", "input": {"at": "it"}},
        {"type": "tool_use", "id": "call_2", "name": "rest", "input": {}},
    ]

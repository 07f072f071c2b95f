"""kv_cache_state over HTTP, as the real `openai` client sends it."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo import LLM, SamplingParams
from octavo.server.openai.protocol import TENANT_HEADER
from server_process import ServerProcess, serving

QUESTION = "User: How do modules, classes and functions differ in what they define?\nAssistant:"
TURNS = [QUESTION, "\nUser: Why is that?\nAssistant:", "\nUser: And else?\nAssistant:"]
HELLO = [{"role": "user", "content": "Say hello to the modules, classes and functions of this language"}]
WHY = [{"role": "user", "content": "Why?"}]


def complete(client: openai.OpenAI, prompt: Any, state: Any = True, **options: Any) -> Any:
    extra = {"ignore_eos": True, "kv_cache_state": state, **options.pop("extra", {})}
    return client.completions.create(
        **{"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12, **options}, extra_body=extra
    )


def chat(client: openai.OpenAI, messages: Any, state: Any = True, **options: Any) -> Any:
    extra = {"ignore_eos": True, "kv_cache_state": state}
    return client.chat.completions.create(
        **{"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12, **options}, extra_body=extra
    )


def error(status: type[openai.APIStatusError], call: Any, *arguments: Any, **options: Any) -> Any:
    with pytest.raises(status) as raised:
        call(*arguments, **options)
    return raised.value.body


# Completions


def test_turns_that_follow_handles_are_the_conversation_sent_whole(client: openai.OpenAI, tiny_llama: Path) -> None:
    handle: Any = True
    replies, states = [], []
    for turn in TURNS:
        replies.append(complete(client, turn, handle))
        states.append(replies[-1].kv_cache_state)
        handle = states[-1]["id"]
    assert len({state["id"] for state in states}) == 3
    with LLM(str(tiny_llama), enable_prefix_caching=False) as llm:
        conversation: list[int] = []
        for turn, reply, state in zip(TURNS, replies, states, strict=True):
            prompt = conversation + llm.tokenizer.encode(turn)
            [whole] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
            assert reply.choices[0].text == whole.text
            assert reply.usage.prompt_tokens == len(prompt)
            assert reply.usage.prompt_tokens_details.cached_tokens == max(len(conversation) - 1, 0)
            conversation = prompt + whole.outputs[0].token_ids
            assert state["tokens"] == len(conversation)
            assert abs(state["expires_at"] - reply.created - 3600) < 60


def test_a_handle_forks_and_a_stream_ends_with_one(client: openai.OpenAI) -> None:
    handle = complete(client, QUESTION).kv_cache_state["id"]
    expected = {turn: complete(client, turn, handle).choices[0].text for turn in (" One", " Two")}
    assert len(set(expected.values())) == 2
    for turn, text in expected.items():
        for options in ({}, {"stream_options": {"include_usage": True}}):
            *chunks, last = complete(client, turn, handle, stream=True, **options)
            assert "".join(chunk.choices[0].text for chunk in chunks) == text
            assert last.choices == [] and last.kv_cache_state["id"] != handle
            assert not any(hasattr(chunk, "kv_cache_state") for chunk in chunks)
            assert (last.usage is not None) == bool(options)
            further = complete(client, " more", last.kv_cache_state["id"])
            assert further.usage.prompt_tokens_details.cached_tokens >= last.kv_cache_state["tokens"] - 1


def test_a_state_is_told_only_if_it_was_asked_for(client: openai.OpenAI) -> None:
    for state in (None, False):
        assert not hasattr(complete(client, QUESTION, state), "kv_cache_state")
        assert not hasattr(chat(client, HELLO, state), "kv_cache_state")
    *_, last = complete(client, QUESTION, None, stream=True)
    assert last.choices


# Chats


@pytest.mark.parametrize("streamed", [False, True])
def test_a_chat_sends_its_new_messages_only(client: openai.OpenAI, streamed: bool) -> None:
    conversation: list[dict[str, str]] = []
    handle: Any = True
    for new in (HELLO, WHY, [{"role": "system", "content": "Be brief."}, *WHY]):
        whole = chat(client, conversation + new, None)
        if streamed:
            *chunks, last = chat(client, new, handle, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            state = last.kv_cache_state
        else:
            reply = chat(client, new, handle)
            text, state = reply.choices[0].message.content, reply.kv_cache_state
            assert reply.usage.prompt_tokens == whole.usage.prompt_tokens
        assert text == whole.choices[0].message.content
        assert state["tokens"] == whole.usage.total_tokens
        conversation += [*new, {"role": "assistant", "content": text}]
        handle = state["id"]
    first = chat(client, HELLO).kv_cache_state
    again = chat(client, WHY, first["id"])
    assert again.usage.prompt_tokens_details.cached_tokens >= first["tokens"] // 32 * 32


def test_a_chat_goes_on_where_a_text_can_be_spelled_in_two_ways(client: openai.OpenAI) -> None:
    """The model writes s eight times; the conversation's text, tokenized again, has ss four times."""
    letter = {"85": 100}
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, logit_bias=letter, extra_body={"kv_cache_state": True}
    )
    assert reply.choices[0].message.content == "ssssssss"
    text = reply.choices[0].message.content
    further = chat(client, WHY, reply.kv_cache_state["id"])
    whole = chat(client, [*HELLO, {"role": "assistant", "content": text}, *WHY], None)
    assert further.choices[0].message.content == whole.choices[0].message.content
    assert further.usage.prompt_tokens == whole.usage.prompt_tokens
    assert further.usage.prompt_tokens_details.cached_tokens < reply.usage.prompt_tokens + 7


# What is refused


def test_handles_that_are_unknown_dropped_or_of_others_are_the_same_to_a_client(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    anns = client.with_options(default_headers={TENANT_HEADER: "ann"})
    of_ann = complete(anns, QUESTION).kv_cache_state["id"]
    dropped = complete(client, QUESTION).kv_cache_state["id"]
    url = f"{server.url}/v1/kv_cache_states"
    assert httpx.get(f"{url}/{dropped}").json()["id"] == dropped
    assert httpx.delete(f"{url}/{dropped}").status_code == 204
    told = [error(openai.NotFoundError, call, client, new, id) for call, new in ((complete, "x"), (chat, HELLO))
            for id in (of_ann, dropped, "kv-0", "")]  # fmt: skip
    for method in ("GET", "DELETE"):
        for id in (of_ann, dropped, "kv-0"):
            reply = httpx.request(method, f"{url}/{id}")
            assert reply.status_code == 404
            told.append(reply.json()["error"])
        assert httpx.request(method, f"{url}/{of_ann}", headers={TENANT_HEADER: "bob"}).status_code == 404
    assert told == [told[0]] * len(told) and told[0]["code"] == "kv_cache_state_not_found"
    in_the_body = complete(client, "x", of_ann, extra={"tenant": "ann"})
    assert in_the_body.usage.prompt_tokens_details.cached_tokens > 0
    assert httpx.get(f"{url}/{of_ann}?tenant=ann").json()["id"] == of_ann
    assert httpx.delete(f"{url}/{of_ann}", headers={TENANT_HEADER: "ann"}).status_code == 204
    error(openai.NotFoundError, complete, anns, "x", of_ann)


def test_requests_that_have_no_one_state(client: openai.OpenAI) -> None:
    handle = complete(client, QUESTION).kv_cache_state["id"]
    for state in (True, handle):
        for options in ({"prompt": ["a", "b"]}, {"prompt": "a", "n": 2}):
            told = error(openai.BadRequestError, complete, client, state=state, **options)
            assert told["param"] == "kv_cache_state" and "n must be 1" in told["message"]
        error(openai.BadRequestError, chat, client, HELLO, state, n=2)
    assert "is not from a chat" in error(openai.BadRequestError, chat, client, HELLO, handle)["message"]
    told = error(openai.BadRequestError, complete, client, "x", handle, extra={"cache_salt": "s"})
    assert "of another tenant or cache_salt" in told["message"]
    handle = chat(client, HELLO).kv_cache_state["id"]
    extra = {"kv_cache_state": handle, "cache_salt": "s"}
    told = error(openai.BadRequestError, client.chat.completions.create, model="tiny", messages=WHY, extra_body=extra)
    assert "of another tenant or cache_salt" in told["message"]
    for wrong in (1, ["x"], {"id": handle}):
        assert "kv_cache_state" in error(openai.BadRequestError, complete, client, "x", wrong)["message"]


def test_a_quota_is_exceeded_before_the_answer(tiny_llama: Path) -> None:
    with ServerProcess(tiny_llama, "--kv-state-quota", "70") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        handle = complete(client, [5] * 20).kv_cache_state["id"]  # 32 tokens
        told = error(openai.RateLimitError, complete, client, [5] * 27)
        assert told["code"] == "kv_state_quota_exceeded" and "kv_state_quota" in told["message"]
        error(openai.RateLimitError, complete, client, [5] * 27, stream=True)
        assert complete(client, [5] * 26, handle).kv_cache_state["tokens"] == 70
        assert complete(client, [5] * 27, None).choices
        assert complete(client, [5] * 27, extra={"tenant": "bob"}).kv_cache_state["tokens"] == 39
        client.close()


def test_a_handle_expires(tiny_llama: Path) -> None:
    async def main() -> None:
        async with (
            serving(tiny_llama, kv_state_ttl=60) as (llm, _, (host, port)),
            httpx.AsyncClient(base_url=f"http://{host}:{port}/v1", timeout=60) as client,
        ):
            late = 0.0
            llm.kv_cache_states._clock = lambda: time.monotonic() + late
            body = {"prompt": QUESTION, "kv_cache_state": True}
            state = (await client.post("/completions", json=body)).json()["kv_cache_state"]
            assert abs(state["expires_at"] - time.time() - 60) < 30
            late = 50.0
            put_off = (await client.get(f"/kv_cache_states/{state['id']}")).json()["expires_at"]
            assert abs(put_off - state["expires_at"] - 50) < 30
            late = 115.0
            reply = await client.post("/completions", json={"prompt": "x", "kv_cache_state": state["id"]})
            assert reply.status_code == 404

    asyncio.run(main())


def test_handles_outlive_a_crash_of_the_engine(server: ServerProcess, client: openai.OpenAI) -> None:
    of_text = complete(client, QUESTION).kv_cache_state["id"]
    of_chat = chat(client, HELLO).kv_cache_state["id"]
    before = complete(client, " more", of_text), chat(client, WHY, of_chat)
    os.kill(server.engine_pid(), signal.SIGKILL)
    after = complete(client, " more", of_text), chat(client, WHY, of_chat)
    assert after[0].choices == before[0].choices
    assert after[1].choices[0].message.content == before[1].choices[0].message.content

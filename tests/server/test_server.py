"""The HTTP server, a real process, as the real `openai` client sees it."""

import asyncio
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import octavo
from octavo.engine.messages import EngineStats
from octavo.server.config import ServerConfig
from server_process import ServerProcess, post, serving

HELLO = [{"role": "user", "content": "Say hello to the modules"}]
LONG = " ".join(f"The module number {i} defines functions." for i in range(20))  # some pages of the KV cache


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> PreTrainedTokenizerBase:
    """transformers' own reading of the tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_llama)


def complete(client: openai.OpenAI, prompt: Any = "The module", **options: Any) -> Any:
    defaults = {"model": "tiny", "temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    return client.completions.create(prompt=prompt, **{**defaults, **options})


def chat(client: openai.OpenAI, messages: Any = HELLO, **options: Any) -> Any:
    defaults = {"model": "tiny", "temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    return client.chat.completions.create(messages=messages, **{**defaults, **options})


def stream_text(stream: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


# What is served


def test_the_curl_line_of_the_banner_works(server: ServerProcess) -> None:
    command = shlex.split(server.banner[server.banner.index("curl") :])
    assert command[:2] == ["curl", f"{server.url}/v1/chat/completions"]
    if shutil.which("curl"):
        command += ["--silent", "--fail"]
        body = json.loads(command[command.index("-d") + 1]) | {"max_tokens": 4}
        command[command.index("-d") + 1] = json.dumps(body)
        reply = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
        assert reply["choices"][0]["message"]["role"] == "assistant"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "octavo"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("some/other")
    assert error.value.code == "model_not_found"


def test_health_and_version(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/version").json() == {"version": octavo.__version__}


# Completions


def test_prompt_shapes(client: openai.OpenAI, reference: PreTrainedTokenizerBase) -> None:
    texts = ["The module", "A function returns the value of"]
    ids = [reference(text)["input_ids"] for text in texts]
    alone = [complete(client, text).choices[0].text for text in texts]
    assert len(set(alone)) == 2
    for both in (texts, ids):
        reply = complete(client, both)
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert [choice.text for choice in reply.choices] == alone
        assert reply.usage.prompt_tokens == sum(map(len, ids))
        assert reply.usage.completion_tokens == 16
    assert complete(client, ids[1]).choices[0].text == alone[1]


def test_stream_of_many_prompts(client: openai.OpenAI) -> None:
    prompts, options = ["The module", "A function", "An object of"], {"n": 2, "seed": 5, "temperature": 1}
    whole = complete(client, prompts, **options)
    texts = dict.fromkeys(range(6), "")
    for chunk in complete(client, prompts, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]


def test_seed_is_reported_and_brings_the_same_text(client: openai.OpenAI) -> None:
    first = complete(client, temperature=1, max_tokens=20)
    assert complete(client, temperature=1, max_tokens=20, seed=first.seed).choices[0].text == first.choices[0].text
    assert complete(client, temperature=1, max_tokens=20).choices[0].text != first.choices[0].text


def test_echo(client: openai.OpenAI, reference: PreTrainedTokenizerBase) -> None:
    text = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == "The module" + text
    assert complete(client, reference("The module")["input_ids"], echo=True).choices[0].text == "The module" + text
    assert stream_text(complete(client, echo=True, stream=True)) == "The module" + text


def test_events_take_one_line_for_clients_that_read_lines(server: ServerProcess) -> None:
    text = "The\x85module\u2028number\u2029é"  # httpx's iter_lines() splits at these characters
    body = {"model": "tiny", "prompt": text, "max_tokens": 1, "echo": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
        chunks = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith(text)


def test_stop_and_its_reason(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=24).choices[0].text
    stop = text[5:8]
    for choice in (
        complete(client, max_tokens=24, stop=stop).choices[0],
        complete(client, max_tokens=24, stop=["never to be seen", stop]).choices[0],
    ):
        assert choice.text == text[: text.index(stop)]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert complete(client).choices[0].finish_reason == "length"


def test_sampling_fields_arrive(client: openai.OpenAI, reference: PreTrainedTokenizerBase) -> None:
    """Each changes the output in the one way it can."""

    def text(**extra: Any) -> str:
        return complete(client, extra_body={"ignore_eos": True, **extra}).choices[0].text

    forced = reference.convert_tokens_to_ids("X")
    assert complete(client, logit_bias={str(forced): 100}).choices[0].text == "X" * 8
    assert text(temperature=1, seed=3, top_k=1) == text()
    assert text(temperature=1, seed=3, min_p=1.0) == text()
    assert text(temperature=1, seed=3) != text()
    assert text(logit_bias={str(forced): 10}, repetition_penalty=10.0) != "X" * 8
    assert text(logit_bias={str(forced): 100}, stop_token_ids=[forced]) == ""
    assert text(logit_bias={str(forced): 100}, stop_token_ids=[forced], min_tokens=3) != ""
    end = reference.eos_token_id
    ended = complete(client, logit_bias={str(end): 100}, extra_body={}).choices[0]
    assert (ended.text, ended.finish_reason) == ("", "stop")


def test_completion_logprobs(client: openai.OpenAI) -> None:
    logprobs = complete(client, logprobs=3, echo=False).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())  # greedy takes the likeliest
    lengths = itertools.accumulate(map(len, logprobs.tokens[:-1]), initial=0)
    assert logprobs.text_offset == list(lengths)
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=3, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in streamed if part for item in getattr(part, name)] == getattr(logprobs, name)


# Chat


def test_chat(client: openai.OpenAI, reference: PreTrainedTokenizerBase) -> None:
    reply = chat(client)
    prompt = reference.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    assert reply.usage.prompt_tokens == len(reference(prompt)["input_ids"])
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert reply.choices[0].message.content == complete(client, prompt).choices[0].text
    assert re.fullmatch("fp_[0-9a-f]{12}", reply.system_fingerprint)
    assert reply.object == "chat.completion"


def test_special_tokens_of_a_chat_come_from_its_template_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """With a tokenizer that puts a token before every text, only a completion's prompt gets it."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = "<|im_start|>user\nSay hello to the modules<|im_end|>\n<|im_start|>assistant\n"
    with ServerProcess(folder) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert chat(client).usage.prompt_tokens == tokens
        assert complete(client, text).usage.prompt_tokens == tokens + 1


def test_a_real_model_answers(smollm2: Path) -> None:
    with ServerProcess(smollm2) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        assert "Paris" in chat(client, question, max_tokens=16).choices[0].message.content


def test_chat_content_as_parts_and_roles(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Say hello"}, {"type": "text", "text": "now"}]
    by_parts = chat(client, [{"role": "developer", "content": "Be short"}, {"role": "user", "content": parts}])
    plain = chat(client, [{"role": "system", "content": "Be short"}, {"role": "user", "content": "Say hello\nnow"}])
    assert by_parts.choices[0].message.content == plain.choices[0].message.content


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    answer = chat(client).choices[0].message
    again = chat(client, [*HELLO, answer, {"role": "user", "content": "And again"}])
    sent = answer.model_dump() | {"annotations": [], "tool_calls": None}
    as_sent = chat(client, [*HELLO, sent, {"role": "user", "content": "And again"}])
    assert as_sent.usage.prompt_tokens == again.usage.prompt_tokens


def test_template_variables(client: openai.OpenAI) -> None:
    with_turn = chat(client).usage.prompt_tokens
    for extra in ({"add_generation_prompt": False}, {"chat_template_kwargs": {"add_generation_prompt": False}}):
        assert chat(client, extra_body=extra).usage.prompt_tokens < with_turn


def test_chat_stream_is_the_whole_in_parts(client: openai.OpenAI) -> None:
    options = {"n": 2, "temperature": 1, "seed": 11, "max_tokens": 20}
    whole = chat(client, **options)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **options))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index in (0, 1):
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == whole.choices[index].message.content
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_usage_is_not_streamed_unasked(client: openai.OpenAI) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in chat(client, stream=True))


def test_chat_logprobs(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=4)
    content = whole.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 4
        assert token.top_logprobs[0].token == token.token  # greedy takes the likeliest
        logprobs = [top.logprob for top in token.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
    spelled = bytes(byte for token in content for byte in token.bytes)
    assert spelled.decode("utf-8", "replace") == whole.choices[0].message.content
    streamed = [c.choices[0].logprobs for c in chat(client, logprobs=True, top_logprobs=4, stream=True)]
    assert [token for part in streamed if part for token in part.content] == content
    assert all(token.top_logprobs == [] for token in chat(client, logprobs=True).choices[0].logprobs.content)


def test_max_completion_tokens(client: openai.OpenAI) -> None:
    assert chat(client, max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3


def test_harmless_fields_are_accepted(client: openai.OpenAI) -> None:
    chat(
        client,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        response_format={"type": "text"},
        modalities=["text"],
        parallel_tool_calls=True,
        tools=[],
    )


def test_long_text(client: openai.OpenAI, reference: PreTrainedTokenizerBase) -> None:
    """Tokenized beside the event loop, to the same tokens; and refused where it cannot fit."""
    text = LONG
    assert complete(client, text, max_tokens=1).usage.prompt_tokens == len(reference(text)["input_ids"])
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, LONG * 40)
    assert error.value.code == "context_length_exceeded"


def test_cached_tokens(client: openai.OpenAI) -> None:
    salt = {"cache_salt": "of this test"}  # other tests may have left a few of the first tokens
    first, second = (complete(client, LONG, extra_body=salt).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


# Many at once


def test_concurrent_streams_say_what_they_say_alone(server: ServerProcess, client: openai.OpenAI) -> None:
    prompts = [f"Function number {i}" for i in range(16)]
    alone = [complete(client, prompt, temperature=1, seed=i, max_tokens=16) for i, prompt in enumerate(prompts)]

    async def stream(client: openai.AsyncOpenAI, prompt: str, seed: int) -> str:
        options: Any = {"model": "tiny", "temperature": 1, "seed": seed, "max_tokens": 16}
        chunks = await client.completions.create(prompt=prompt, stream=True, extra_body={"ignore_eos": True}, **options)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, prompt, i) for i, prompt in enumerate(prompts)))

    assert asyncio.run(all_at_once()) == [reply.choices[0].text for reply in alone]


def test_a_thousand_queued_requests(server: ServerProcess) -> None:
    """Bare connections, as a client library would take most of the time."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    lengths = [16 + i * 37 % 481 for i in range(1000)]

    async def one(prompt: str, length: int) -> int:
        reader, writer = await post(server.address, {"prompt": prompt, "max_tokens": length, "ignore_eos": True})
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 200 "), head + body
        return int(json.loads(body)["usage"]["completion_tokens"])

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(one(f"Request {i}", length) for i, length in enumerate(lengths)))

    assert asyncio.run(all_at_once()) == lengths


# The end: of a connection, of the server, of the engine


@pytest.mark.parametrize("options", [{"stream": True}, {"stream": False}, {"stream": True, "n": 4}])
def test_a_client_that_leaves_frees_its_request(tiny_llama: Path, options: dict[str, Any]) -> None:
    async def leave() -> EngineStats:
        async with serving(tiny_llama) as (llm, _, address):
            body = {"prompt": ["Tell a", "long story"], "max_tokens": 480, "ignore_eos": True, **options}
            _, writer = await post(address, body)
            while (stats := await llm.stats()).tokens_generated == 0:
                pass
            assert stats.running > 0
            writer.close()
            while (stats := await llm.stats()).running:
                pass
            return stats

    stats = asyncio.run(leave())
    assert stats.tokens_generated < 0.75 * 2 * 480 * options.get("n", 1)
    assert stats.free_pages + stats.cached_pages == stats.num_pages


def test_a_queued_stream_is_kept_alive(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another request has the only place, comments come; then the events."""
    monkeypatch.setattr("octavo.server.openai.events.PING_SECONDS", 0.02)

    async def wait() -> bytes:
        async with serving(tiny_llama, max_batch_size=1) as (llm, _, address):
            _first = await post(address, {"prompt": "First", "max_tokens": 480, "ignore_eos": True})
            while (await llm.stats()).running == 0:
                pass
            reader, _ = await post(address, {"prompt": "Second", "max_tokens": 1, "stream": True})
            return await reader.read()

    got = asyncio.run(wait())
    assert got.startswith(b"HTTP/1.1 200 ")
    assert got.index(b": waiting") < got.index(b"data: {")
    assert b"data: [DONE]" in got


def test_the_drain_timeout_ends_requests(tiny_llama: Path) -> None:
    async def drain() -> list[bytes]:
        async with serving(tiny_llama, ServerConfig(drain_timeout=0.1), max_batch_size=1) as (llm, server, address):
            body = {"prompt": "Endless", "max_tokens": 480, "n": 50, "ignore_eos": True}
            connections = [await post(address, body | {"stream": stream}) for stream in (True, False)]
            while (await llm.stats()).tokens_generated < 2:
                pass
            server.should_exit = True
            return [await reader.read() for reader, _ in connections]

    stream, whole = asyncio.run(drain())
    assert stream.startswith(b"HTTP/1.1 200 ") and whole.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"server_stopping"' in stream and b'"code":"server_stopping"' in whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_draining(tiny_llama: Path, number: signal.Signals) -> None:
    """After the signal a running stream ends as it would have, nobody new is let in, and the exit code is 0."""
    with ServerProcess(tiny_llama) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = complete(client, stream=True, max_tokens=450, stream_options={"include_usage": True})
        next(stream)
        server.signal(number)
        server.wait_until_closed()
        assert list(stream)[-1].usage.completion_tokens == 450
        assert server.process.wait(timeout=30) == 0


def test_a_second_signal_ends_at_once(tiny_llama: Path) -> None:
    with ServerProcess(tiny_llama, "--max-batch-size", "1") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = complete(client, stream=True, max_tokens=450, n=16)
        next(stream)
        server.signal(signal.SIGTERM)
        server.wait_until_closed()
        server.signal(signal.SIGINT)
        with pytest.raises(openai.APIError):
            list(stream)
        assert server.process.wait(timeout=30) == 0


def test_crashes_of_the_engine(tiny_llama: Path) -> None:
    """A stream goes on to the same text, also when the next engine is killed while it loads."""
    with ServerProcess(tiny_llama) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        expected = complete(client, max_tokens=400).choices[0].text
        for kills in (1, 2):
            stream = complete(client, stream=True, max_tokens=400)
            first = next(stream)
            killed = None
            for _ in range(kills):
                killed = server.engine_pid(other_than=killed)
                os.kill(killed, signal.SIGKILL)
            assert first.choices[0].text + stream_text(stream) == expected
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_start_errors(server: ServerProcess, tiny_llama: Path) -> None:
    """One line, exit code 2."""
    _, port = server.address
    for flags, complaint in (
        (["--port", str(port)], f"port {port}"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--tensor-parallel-size", "4", "--port", "0"], "tensor_parallel_size"),
        (["--port", "99999"], "65535"),
        (["--prot", "1"], "--prot"),
    ):
        command = [sys.executable, "-m", "octavo.entrypoints.openai.api_server", "--model", str(tiny_llama), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr

"""Tools, reasoning and templates over HTTP, as the real `openai` client sees them; the model's output is scripted."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server_process import ServerProcess

# Run first in the server's process: the text of token number i of every answer is piece number i of the script.
SCRIPTED = """
import json, pathlib
from octavo.frontend.live import LiveRequest
script = pathlib.Path(__file__).with_name("script.json")
original = LiveRequest._text
def scripted(self, completion, output):
    if not script.exists():
        return original(self, completion, output)
    pieces = json.loads(script.read_text())
    at = len(completion.token_ids)
    if at + 1 >= len(pieces):
        self._finish(completion, "stop", None)
    return pieces[at] if at < len(pieces) else ""
LiveRequest._text = scripted
"""
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HELLO: Any = [{"role": "user", "content": "Say hello"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Tromsø"}}\n</tool_call>'
Script = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripted")
    (path / "sitecustomize.py").write_text(SCRIPTED)
    return path


@pytest.fixture(scope="module")
def server(tiny_llama: Path, folder: Path) -> Iterator[ServerProcess]:
    flags = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", "--trust-request-chat-template")
    with ServerProcess(tiny_llama, *flags, PYTHONPATH=str(folder)) as server:
        yield server


@pytest.fixture
def script(folder: Path) -> Iterator[Script]:
    """Set the text of the next answers, cut into pieces of `size` characters."""

    def write(text: str, size: int = 3) -> None:
        (folder / "script.json").write_text(json.dumps([text[i : i + size] for i in range(0, len(text), size)]))

    yield write
    (folder / "script.json").unlink(missing_ok=True)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    body = {"ignore_eos": True, **options.pop("extra_body", {})}
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "max_tokens": 200, "extra_body": body, **options}
    )


def test_a_call(client: openai.OpenAI, script: Script) -> None:
    script("Let me see.\n" + CALL + "\n" + CALL)
    [choice] = chat(client, tools=[WEATHER]).choices
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name, first.function.arguments) == ("function", "weather", '{"city": "Tromsø"}')
    assert first.id != second.id
    script(CALL)
    assert chat(client, tools=[WEATHER]).choices[0].message.content is None
    script(CALL)
    assert chat(client, tools=[WEATHER], tool_choice="none").choices[0].message.content == CALL
    script(CALL)
    assert chat(client).choices[0].finish_reason == "stop"


def test_a_streamed_call(client: openai.OpenAI, script: Script) -> None:
    script("Hm. " + CALL + CALL, size=1)
    chunks = [chunk.choices[0] for chunk in chat(client, tools=[WEATHER], stream=True)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [call.index for call in deltas] == sorted(call.index for call in deltas)
    for index in (0, 1):
        first, *rest = [call for call in deltas if call.index == index]
        assert (first.type, first.function.name, first.function.arguments) == ("function", "weather", "")
        assert first.id and all(call.id is None and call.function.name is None for call in rest)
        assert len(rest) > 10
        assert "".join(call.function.arguments for call in rest) == '{"city": "Tromsø"}'
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Hm."
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_the_clients_own_helper_for_streams(client: openai.OpenAI, script: Script) -> None:
    script(CALL)
    options: Any = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "extra_body": {"ignore_eos": True}}
    with client.chat.completions.stream(**options, max_tokens=200) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls and message.tool_calls[0].function.arguments == '{"city": "Tromsø"}'


def test_forced_calls(client: openai.OpenAI, script: Script) -> None:
    script('{"city": "Oslo"}')
    named = {"type": "function", "function": {"name": "weather"}}
    chunks = [each.choices[0].delta for each in chat(client, tools=[WEATHER], tool_choice=named, stream=True)]
    assert "".join(call.function.arguments or "" for delta in chunks for call in delta.tool_calls or []) == (
        '{"city": "Oslo"}'
    )
    script('[{"name": "weather", "parameters": {"city": "Oslo"}}]')
    [call] = chat(client, tools=[WEATHER], tool_choice="required").choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}')


def test_a_malformed_call_is_text(client: openai.OpenAI, script: Script) -> None:
    script("<tool_call>weather?</tool_call>")
    message = chat(client, tools=[WEATHER]).choices[0].message
    assert (message.content, message.tool_calls) == ("<tool_call>weather?</tool_call>", None)


def test_reasoning(client: openai.OpenAI, script: Script) -> None:
    script("<think>\nOne.\n</think>\n\nTwo.\n" + CALL)
    message = chat(client, tools=[WEATHER]).choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == ("One.", "One.", "Two.")
    assert message.tool_calls[0].function.name == "weather"
    deltas = [each.choices[0].delta for each in chat(client, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "One."
    assert "".join(delta.content or "" for delta in deltas) == "Two.\n" + CALL
    message = chat(client, extra_body={"include_reasoning": False}).choices[0].message
    assert not hasattr(message, "reasoning") and message.content.startswith("Two.")


def test_structured_output_begins_after_the_reasoning(client: openai.OpenAI) -> None:
    schema = {"name": "point", "schema": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}}
    answers = [
        chat(
            client,
            seed=seed,
            max_tokens=60,
            temperature=1.5,
            response_format={"type": "json_schema", "json_schema": schema},
        )
        for seed in range(16)
    ]
    choices = [answer.choices[0] for answer in answers]
    begun = {json.loads(choice.message.content)["x"] for choice in choices if choice.finish_reason == "stop"}
    assert begun <= {1, 2} and begun
    assert any(getattr(choice.message, "reasoning_content", None) for choice in choices)


def rendered(server: ServerProcess, **body: Any) -> str:
    reply = httpx.post(f"{server.url}/v1/chat/completions/render", json={"messages": HELLO, **body})
    assert reply.status_code == 200, reply.text
    tokens = reply.json()["token_ids"]
    return str(httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()["prompt"])


def test_a_template_without_tools_gets_a_system_message(server: ServerProcess) -> None:
    prompt = rendered(server, tools=[WEATHER])
    assert '"name": "weather"' in prompt and "Say hello" in prompt
    assert "weather" not in rendered(server, tools=[WEATHER], tool_choice="none")
    system = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert "Be brief.\n\nYou can call" in rendered(server, messages=system, tools=[WEATHER])


def test_a_template_of_the_request(server: ServerProcess) -> None:
    template = (
        "{% for m in messages %}{{ m.name }}:{{ m.reasoning_content }}:{{ m.content }};{% endfor %}"
        "{{ documents[0].text }} {{ reasoning_effort }} {{ tools[0].function.name }}"
    )
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            "name": "n",
        },
        {"role": "assistant", "content": "b", "reasoning": "r", "cache_control": {"type": "ephemeral"}},
    ]
    options = {"documents": [{"text": "d"}], "reasoning_effort": "low", "tools": [WEATHER]}
    prompt = rendered(server, messages=messages, chat_template=template, **options)
    assert prompt == "n::a;:r:b;d low weather"
    broken = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, "chat_template": "{% for"})
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, "messages")
    assert "Say hello" in rendered(server)  # the model's own template is unharmed


def test_the_end_of_a_long_chat(server: ServerProcess) -> None:
    whole = rendered(server)
    assert whole.endswith(rendered(server, truncate_prompt_tokens=5))
    long = [{"role": "user", "content": "word " * 2000}]
    assert "word" in rendered(server, messages=long, truncate_prompt_tokens=-1)


def test_the_older_form_of_tools(client: openai.OpenAI, script: Script) -> None:
    script("Let me see.\n" + CALL + "\n" + CALL)
    function = WEATHER["function"]
    [choice] = chat(client, functions=[function]).choices
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "function_call")
    call = choice.message.function_call
    assert (call.name, call.arguments, choice.message.tool_calls) == ("weather", '{"city": "Tromsø"}', None)
    deltas = [chunk.choices[0].delta for chunk in chat(client, functions=[function], stream=True)]
    calls = [delta.function_call for delta in deltas if delta.function_call]
    assert [call.name for call in calls if call.name] == ["weather"]
    assert "".join(call.arguments or "" for call in calls) == '{"city": "Tromsø"}'
    script("{}")
    assert chat(client, functions=[function], function_call={"name": "weather"}).choices[0].message.function_call
    history = [
        *HELLO,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "rain"},
    ]
    script("It rains.")
    assert chat(client, messages=history, functions=[function]).choices[0].message.content == "It rains."
    for wrong in ({"functions": [function], "tools": [WEATHER]}, {"function_call": {"name": "weather"}}):
        with pytest.raises(openai.BadRequestError):
            chat(client, **wrong)

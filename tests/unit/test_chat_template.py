"""Chat templates in their worker processes: limits, formats of content, and what happens to the processes."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from octavo.errors import InvalidRequest
from octavo.text import Tokenizer, chat_template
from octavo.text.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SWITCHED = "{% if slow is defined %}" + FOREVER + "{% endif %}{{ messages[0].content }}"


@contextmanager
def made(source: str, **limits: Any) -> Iterator[ChatTemplate]:
    template = ChatTemplate(source, **limits)
    yield template
    template.close()


@pytest.mark.parametrize(
    "source",
    [
        FOREVER,
        "{% for i in range(99999) %}{{ lipsum(100000) }}{% endfor %}",
        "{{ (10 ** 10) ** (10 ** 8) }}",  # one instruction of Python, which no thread could interrupt
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_endless_templates_are_ended(source: str) -> None:
    with made(source, seconds=0.1) as template, pytest.raises(InvalidRequest, match="took longer than") as caught:
        template.render(HELLO)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        '{{ "x".center(2000000000) }}',
        '{{ "x" * 10 ** 10 }}',
        '{{ "%2000000000d" % 1 }}',
        '{{ ("a" * 10000).replace("a", "b" * 100000) }}',
        "{% set ns = namespace(x='1') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set big = messages[0].content * 1000000 %}{% for a in range(10000) %}{{ big }}{% endfor %}",
    ],
)
def test_templates_that_fill_the_memory_are_ended(source: str) -> None:
    with made(source) as template:
        with pytest.raises(InvalidRequest, match="too much memory"):
            template.render(HELLO)
        with pytest.raises(InvalidRequest, match="too much memory"):  # and so again, by a fresh process
            template.render(HELLO)


def test_a_rendering_that_hangs_delays_no_other() -> None:
    """Another process renders meanwhile. The slow one has nearly unlimited time here, so nobody waits for its end."""
    with made(SWITCHED, seconds=100) as template:
        errors: list[str] = []

        def hang() -> None:
            with pytest.raises(InvalidRequest) as caught:
                template.render(HELLO, slow=True)
            errors.append(str(caught.value))

        slow = threading.Thread(target=hang)
        template.render(HELLO)
        [worker] = template._workers._idle
        slow.start()
        while template._workers._idle:
            pass
        assert template.render(HELLO) == "hello"
        os.kill(worker._process.pid, signal.SIGKILL)
        slow.join()
        assert errors == ["the chat template crashed while it rendered the messages"]
        assert template.render(HELLO) == "hello"


def test_a_killed_process_is_replaced() -> None:
    with made("{{ messages[0].content }}") as template:
        template.start()
        assert template.render(HELLO) == "hello"
        [worker] = template._workers._idle
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        assert template.render(HELLO) == "hello"


def test_many_renderings_at_once_in_an_event_loop() -> None:
    async def main(template: ChatTemplate) -> list[str]:
        chats = [[{"role": "user", "content": str(i)}] for i in range(50)]
        return await asyncio.gather(*(template.arender(chat) for chat in chats))

    with made("{{ messages[0].content }}") as template:
        assert asyncio.run(main(template)) == asyncio.run(main(template)) == [str(i) for i in range(50)]


def test_limits_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_INPUT_BYTES", 10_000)
    monkeypatch.setattr(chat_template, "MAX_PROMPT_BYTES", 10_000)
    with made("{{ messages[0].content * 100 }}") as template:
        for messages, reason in [
            (HELLO * 400_000, "at most 10,000 messages"),
            ([{"role": "user", "content": "x" * 10_000}], "the limit is 10,000"),
            ([{"role": "user", "content": "x" * 1000}], "a prompt of over 10,000 bytes"),
            ([{"role": "user", "content": "\ud800"}], "valid Unicode"),
            ([{"role": "user", "content": object()}], "must be JSON"),
        ]:
            with pytest.raises(InvalidRequest, match=reason):
                template.render(messages)
        assert template.render(HELLO) == "hello" * 100


def test_the_process_ends_with_its_parent_and_ignores_the_current_folder(tmp_path: Path) -> None:
    """The parent is killed while the worker is idle. Modules in the current folder are not what the worker imports."""
    for name in ("jinja2", "random", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    parent = textwrap.dedent("""
        import os, signal
        from octavo.text.chat_template import ChatTemplate
        template = ChatTemplate("{{ messages[0].content }}")
        answer = template.render([{"role": "user", "content": "hello"}])
        print(answer, template._workers._idle[0]._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-P", "-c", parent], cwd=tmp_path, stdout=subprocess.PIPE, timeout=60)
    answer, pid = done.stdout.split()
    assert answer == b"hello" and done.returncode == -signal.SIGKILL
    ends = Path(f"/proc/{int(pid)}/stat")
    for _ in range(10_000):  # the kernel closes the dead parent's end of the socket, and the worker reads that
        if not ends.exists() or ends.read_text().split()[2] == "Z":
            return
        os.sched_yield()
        threading.Event().wait(0.001)
    raise AssertionError("the worker outlives its parent")


def test_after_a_fork_each_process_has_its_own_worker() -> None:
    with made("{{ messages[0].content }}") as template:
        template.render(HELLO)
        child = os.fork()
        if child == 0:
            ok = template.render(HELLO) == "hello" and template._workers._process == os.getpid()
            template.close()
            os._exit(0 if ok else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        [worker] = template._workers._idle
        assert worker.alive and template.render(HELLO) == "hello"


# Formats of content

PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
LOOPS = (
    "{% for message in messages %}{% for part in message['content'] %}<{{ part.text }}>{% endfor %}{% endfor %}",
    "{% for m in messages[1:] + messages %}{% endfor %}{% set all = messages %}{% for m in all %}"
    "{% set c = m.content | list %}{% for part in c %}<{{ part['text'] }}>{% endfor %}{% endfor %}",
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}",
)


@pytest.mark.parametrize("source", LOOPS)
def test_parts_reach_templates_that_loop_over_them(source: str) -> None:
    with made(source) as template:
        assert template.render(PARTS) == "<one><two>"


def test_a_string_reaches_a_template_that_takes_parts_only_as_a_part() -> None:
    with made(LOOPS[0]) as parts_only, made(LOOPS[2]) as both:
        assert (parts_only.render(HELLO), both.render(HELLO)) == ("<hello>", "hello")


def test_other_templates_get_one_string() -> None:
    with made("{% for m in messages %}{% for t in m.tool_calls or [] %}{% endfor %}{{ m.content }}{% endfor %}") as one:
        assert one.render(PARTS) == "one\ntwo"


def test_no_content_beside_tool_calls_is_none() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    with made("{{ messages[0].content is none }} {{ messages[0].tool_calls[0].function | tojson }}") as template:
        assert template.render([message]) == 'True {"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize("source", ['{{ "<" + messages[0].content + ">" }}', "<{{ messages[0]['content'] }}>"])
def test_no_content_is_empty_for_templates_that_do_not_test_for_none(source: str) -> None:
    with made(source) as template:
        assert template.render([{"role": "assistant", "content": None}]) == "<>"


# Continuing the last message


@pytest.mark.parametrize("shown", ["message.content", "message.content | trim"])
@pytest.mark.parametrize("content", ["The answer", " The answer is ", "x", [{"type": "text", "text": "The answer "}]])
def test_the_last_message_is_continued_as_by_transformers(
    tiny_llama: Path, tmp_path: Path, shown: str, content: Any
) -> None:
    if isinstance(content, list):
        shown = "message.content[0].text"
    source = "{% for message in messages %}[{{ message.role }}]{{ SHOWN }}[end]\n{% endfor %}".replace("SHOWN", shown)
    if isinstance(content, list):
        source += "{% for message in messages %}{% for part in message.content %}{% endfor %}{% endfor %}"
    for file in tiny_llama.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(source)
    question = content if isinstance(content, str) else [{"type": "text", "text": "why"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    assert Tokenizer.load(tmp_path).chat(messages, continue_final_message=True) == theirs


@pytest.mark.parametrize(
    "source, last, reason",
    [
        ("{{ messages[0].content }}", "x", "leaves out the last message"),
        ("{{ messages[-1].content }}", None, "no content that the chat template shows"),
        ("{{ messages[-1].role }}", "x", "no content that the chat template shows"),
    ],
)
def test_what_cannot_be_continued(source: str, last: str | None, reason: str) -> None:
    with made(source) as template, pytest.raises(InvalidRequest, match=reason):
        template.render([*HELLO, {"role": "assistant", "content": last}], continue_final_message=True)


def test_continuing_excludes_a_generation_prompt() -> None:
    with made("x") as template, pytest.raises(InvalidRequest, match="exclude each other"):
        template.render(HELLO, continue_final_message=True, add_generation_prompt=True)

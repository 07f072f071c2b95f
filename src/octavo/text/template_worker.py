"""The process that renders one chat template: `python -P template_worker.py`, started by chat_template.py.

A template is a program, which may loop forever or fill the memory. In its own process it cannot hurt the server: the
kernel ends the process at its limits, and the parent starts another one. The process also ends when its standard input
is closed, which happens when its parent ends.

Only the standard library and jinja2 are imported, and nothing of octavo, so that it starts quickly.

A frame, in both directions, is a length (8 bytes, little-endian) followed by that many bytes. The first frame from the
parent is JSON, {"source", "memory", "seconds"}; the empty answer means that the template is compiled. Each later frame
is a request, {"messages", "continue_field", "variables"}. Its answer is a status byte, followed by the prompt
(RENDERED) or by {"message", "param"} (REFUSED). After OUT_OF_MEMORY the process ends.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

RENDERED, REFUSED, OUT_OF_MEMORY = b"+", b"-", b"m"

_CONTINUATION = "OCTAVO_CONTINUES_HERE "  # marks the end of the message to continue, as transformers does
_MEMORY_PER_INPUT_BYTE = 8  # the JSON, its strings, their concatenation, the prompt and its bytes


class Refused(Exception):
    """A conversation that cannot be rendered. `param` names the field of the request at fault."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


class Template:
    """A compiled template. Conventions: https://huggingface.co/docs/transformers/chat_templating_writing"""

    def __init__(self, source: str) -> None:
        """Compile `source`. Raises jinja2.TemplateError."""
        environment = _environment()
        tree = environment.parse(source)
        self._source = source
        self._compiled = environment.from_string(source)
        self.takes_parts = loops_over_parts(tree)
        tests = list(tree.find_all(nodes.Test))
        self._takes_strings = not self.takes_parts or any(test.name == "string" for test in tests)
        self._takes_none = any(test.name == "none" and _content_of(test.node) is not None for test in tests)

    def render(self, messages: list[Any], continue_field: str | None, variables: dict[str, Any]) -> str:
        """Return the prompt of a conversation. With `continue_field`, it ends with that field of the last message.

        Raises:
            Refused: The messages are malformed, or the template raised an exception.
            MemoryError: The template needs more memory than this process may have.
        """
        messages = [self._message(i, message) for i, message in enumerate(messages)]
        if continue_field is not None:
            messages[-1] = self._marked(messages[-1], continue_field)
        if not self._takes_none:
            messages = [{**each, "content": ""} if each.get("content") is None else each for each in messages]
        try:
            prompt = self._compiled.render(messages=messages, **variables)
        except (Refused, MemoryError):
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise Refused(f"the model's chat template refused the messages: {_one_line(error)}") from None
        return prompt if continue_field is None else _up_to_mark(prompt)

    def _message(self, i: int, message: Any) -> dict[str, Any]:
        """Return `message` with its content in the format that the template expects."""
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(f"messages[{i}] must be an object with a role")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise Refused(f"messages[{i}].content may only have text parts")
            if self.takes_parts:
                return {**message, "content": [{"type": "text", **part} for part in content]}
            return {**message, "content": "\n".join(part["text"] for part in content)}
        if isinstance(content, str):
            return message if self._takes_strings else {**message, "content": [{"type": "text", "text": content}]}
        if content is not None:
            raise Refused(f"messages[{i}].content must be a string or a list of text parts")
        return message

    def _marked(self, message: dict[str, Any], field: str) -> dict[str, Any]:
        """Return `message` with a mark at the end of its `field`."""
        value = message.get(field)
        if isinstance(value, str) and field in self._source:
            return {**message, field: value + _CONTINUATION}
        if isinstance(value, list) and value and field in self._source:
            *first, last = value
            if isinstance(last, dict) and isinstance(last.get("text"), str):
                return {**message, field: [*first, {**last, "text": last["text"] + _CONTINUATION}]}
        raise Refused(f"the last message has no {field} that the chat template shows", "continue_final_message")


def _up_to_mark(prompt: str) -> str:
    """Return the text before the mark. A mark without its space shows that the template trims: trim the text too."""
    at = prompt.rfind(_CONTINUATION.strip())
    if at < 0:
        raise Refused("the chat template leaves out the last message, so it cannot be continued", "messages")
    return prompt[:at] if prompt.startswith(_CONTINUATION, at) else prompt[:at].rstrip()


# Content formats


def loops_over_parts(tree: nodes.Template) -> bool:
    """Return whether a template loops over the parts of a message's content itself.

    The rule is that of vLLM (`_detect_content_format`): there is a `for` loop over `message.content`, where `message`
    is an element of `messages`, or over a variable that was set to it.
    """
    conversations = _aliases(tree, "messages")
    items = {"message"} | {
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and any(_is_variable(loop.iter, name) for name in conversations)
    }
    contents: set[str] = set()
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and any(_is_content(assignment.node, item) for item in items):
            contents |= _aliases(tree, assignment.target.name)
    return any(
        any(_is_content(loop.iter, item) for item in items) or any(_is_variable(loop.iter, name) for name in contents)
        for loop in tree.find_all(nodes.For)
    )


def _aliases(tree: nodes.Template, name: str) -> set[str]:
    """Return `name` and the variables that are set to it, to a slice of it, or to it filtered."""
    found, new = {name}, [name]
    while new:
        known = new.pop()
        for assignment in tree.find_all(nodes.Assign):
            target = assignment.target
            if isinstance(target, nodes.Name) and target.name not in found and _is_variable(assignment.node, known):
                found.add(target.name)
                new.append(target.name)
    return found


def _is_variable(node: nodes.Node | None, name: str) -> bool:
    node = _unfiltered(node)
    return isinstance(node, nodes.Name) and node.name == name


def _is_content(node: nodes.Node | None, item: str) -> bool:
    """Return whether `node` is item.content or item["content"], sliced or filtered."""
    return _is_variable(_content_of(node), item)


def _content_of(node: nodes.Node | None) -> nodes.Node | None:
    """Return x if `node` is x.content or x["content"], sliced or filtered, and None for other nodes."""
    node = _unfiltered(node)
    if isinstance(node, nodes.Getitem):
        return node.node if isinstance(node.arg, nodes.Const) and node.arg.value == "content" else None
    return node.node if isinstance(node, nodes.Getattr) and node.attr == "content" else None


def _unfiltered(node: nodes.Node | None) -> nodes.Node | None:
    while isinstance(node, (nodes.Filter, nodes.Test)) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


# Filters and functions for templates in addition to Jinja's own


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's tokens for training; for inference only its body counts."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's convention)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise Refused(_one_line(message))


def _one_line(error: object) -> str:
    line = " ".join(str(error)[:2000].split()) or type(error).__name__
    return line if len(line) <= 500 else line[:500] + " ..."


# The process


def main() -> None:
    """Answer requests until the standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a draining server still renders; when it ends, so does the input
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # the timers of _limited end the process
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    setup = json.loads(_receive())
    memory, seconds = _address_space() + setup["memory"], setup["seconds"]
    with _limited(memory, seconds):
        template, fault = _compile(setup["source"])
    _send(b"")
    while True:
        request = _receive()
        with _limited(memory + len(request) * _MEMORY_PER_INPUT_BYTE, seconds):
            answer = _answer(template, fault, request)
        del request
        _send(answer)
        if answer == OUT_OF_MEMORY:
            return
        del answer


def _compile(source: str) -> tuple[Template | None, str]:
    try:
        return Template(source), ""
    except Exception as error:  # TemplateError, but also RecursionError, MemoryError or SyntaxError
        return None, f"this model's chat template is broken: {_one_line(error)}"


def _answer(template: Template | None, fault: str, request: bytes) -> bytes:
    try:
        if template is None:
            raise Refused(fault)
        call = json.loads(request)
        return RENDERED + template.render(call["messages"], call["continue_field"], call["variables"]).encode()
    except MemoryError:
        return OUT_OF_MEMORY
    except UnicodeEncodeError:
        refusal = Refused("the chat template made text that is not valid Unicode")
    except Refused as error:
        refusal = error
    return REFUSED + json.dumps({"message": str(refusal), "param": refusal.param}).encode()


@contextlib.contextmanager
def _limited(memory: int, seconds: float) -> Iterator[None]:
    """Make allocations beyond `memory` bytes of address space fail, and end the process after `seconds` of CPU time.

    Wall-clock time is limited by the parent. The wall-clock timer here matters only if the parent has ended.
    """
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    resource.setrlimit(resource.RLIMIT_AS, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _address_space() -> int:
    """Return the bytes of address space in use, which is what RLIMIT_AS limits."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return 256 << 20


def _receive() -> bytes:
    """Return the next frame. Ends the process at the end of the input."""
    header = sys.stdin.buffer.read(8)
    size = int.from_bytes(header, "little")
    frame = sys.stdin.buffer.read(size) if len(header) == 8 else b""
    if len(header) < 8 or len(frame) < size:
        os._exit(0)
    return frame


def _send(frame: bytes) -> None:
    sys.stdout.buffer.write(len(frame).to_bytes(8, "little"))
    sys.stdout.buffer.write(frame)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

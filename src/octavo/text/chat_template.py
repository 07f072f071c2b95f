"""Chat templates: a conversation as a prompt, rendered by worker processes within limits of time and memory."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from octavo.config import TEMPLATE_MEMORY, TEMPLATE_SECONDS
from octavo.errors import InvalidRequest
from octavo.secret import without_secrets

MAX_MESSAGES = 10_000  # of a conversation
MAX_INPUT_BYTES = 16 << 20  # of a conversation as JSON, with tools and all other variables
MAX_PROMPT_BYTES = 64 << 20
MAX_WORKERS = 4  # processes per template

_START_SECONDS = 20.0  # for Python to start, import jinja2 and compile the template
_PATIENCE = 0.3  # seconds that a request waits for a busy worker before another one is started

# With this setting, glibc always returns freed blocks of this size to the system; by default, only the first one.
_RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}

_RENDERED, _OUT_OF_MEMORY = b"+", b"m"  # as in template_worker.py, which takes long to import


class ChatTemplate:
    """A model's chat template, a Jinja program with the conventions of Hugging Face's apply_chat_template.

    A rendering that exceeds its limits of time or memory is refused; it does not delay renderings in other processes.
    The first process starts with the first rendering, in 0.15 s, or with `start`.
    """

    def __init__(self, source: str, *, seconds: float = TEMPLATE_SECONDS, memory: int = TEMPLATE_MEMORY) -> None:
        """Make a template of `source`, which is compiled with the first rendering.

        Args:
            seconds: Processor time that a rendering may take; of wall-clock time it may take twice as much.
            memory: Bytes that a rendering may allocate beyond those of the idle process and eight times its input.
        """
        self._seconds = seconds
        self._setup = msgspec.json.encode({"source": source, "memory": memory, "seconds": seconds})
        self._workers = _Workers(self._setup)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """Return the prompt of a conversation.

        Args:
            messages: Objects with a "role" and a "content": a string, a list of {"type": "text", "text": ...}, or None.
                If the template does not loop over parts itself, they are joined with newlines. None becomes "", unless
                the template tests for it.
            add_generation_prompt: End with the header of the assistant's answer. Default: True, unless
                continue_final_message is set.
            continue_final_message: End with the last message's content, for the model to continue it; a string names
                another field to continue, such as "reasoning_content".
            variables: Other variables of the template, such as `tools`; values must be JSON.

        Raises:
            InvalidRequest: The template is broken, refuses the messages (with its own reason, if it gives one), or
                exceeds a limit of this module.
        """
        request = _request(messages, add_generation_prompt, continue_final_message, variables)
        worker = self._workers.acquire()
        try:
            answer = worker.ask(request, self._seconds)
        except BaseException:
            worker.close()
            raise
        finally:
            self._workers.release(worker)
        if answer[:1] == _RENDERED:
            return str(memoryview(answer)[1:], "utf-8")
        refusal = msgspec.json.decode(memoryview(answer)[1:])
        raise InvalidRequest(refusal["message"], refusal["param"])

    async def arender(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """Do what `render` does, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: self.render(messages, **variables))

    def start(self) -> None:
        """Begin to start a process, so that the first rendering need not wait for it. Returns at once."""
        self._workers.release(self._workers.acquire())

    def close(self) -> None:
        """End the processes that are idle. Later renderings start new ones."""
        self._workers.close()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(MAX_WORKERS, "octavo-template")


def _request(
    messages: Any, add_generation_prompt: bool | None, continue_final_message: bool | str, variables: dict[str, Any]
) -> bytes:
    """Encode a request to a worker as JSON. Raises InvalidRequest if that is impossible or the result is too large."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages must be at most {MAX_MESSAGES:,} messages, not {len(messages):,}", "messages")
    for i, message in enumerate(messages):  # bytes would be written as base64
        if isinstance(message, dict) and isinstance(message.get("content"), bytes | bytearray | memoryview):
            raise InvalidRequest(f"messages[{i}].content must be a string or a list of text parts", "messages")
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other: the prompt ends either with the last "
            "message or with the header of a new one",
            "continue_final_message",
        )
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    defaults = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    call = {
        "messages": messages,
        "continue_field": field if continue_final_message else None,
        "variables": defaults | variables,
    }
    try:
        request = msgspec.json.encode(call)
    except UnicodeEncodeError:
        raise InvalidRequest("messages must be valid Unicode, without lone surrogates", "messages") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"messages and the template's variables must be JSON: {error}", "messages") from None
    if len(request) > MAX_INPUT_BYTES:
        raise InvalidRequest(f"messages have {len(request):,} bytes; the limit is {MAX_INPUT_BYTES:,}", "messages")
    return request


class _Workers:
    """The processes of one template, from none to MAX_WORKERS. Safe to use from several threads, and after a fork."""

    def __init__(self, setup: bytes) -> None:
        self._setup = setup
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._free = threading.Condition()
        self._idle: list[_Worker] = []
        self._count = 0

    def acquire(self) -> "_Worker":
        """Return an idle worker. Start one if there is none yet, or if all have been busy for _PATIENCE seconds."""
        if self._process != os.getpid():
            self._reset()  # a forked child must not use the workers of its parent
        give_up = time.monotonic() + _PATIENCE
        with self._free:
            while True:
                while self._idle:
                    worker = self._idle.pop()
                    if worker.alive:
                        return worker
                    worker.close()
                    self._count -= 1
                left = give_up - time.monotonic()
                if self._count == 0 or (self._count < MAX_WORKERS and left <= 0):
                    self._count += 1
                    break
                self._free.wait(left if self._count < MAX_WORKERS else None)
        try:
            return _Worker(self._setup)
        except BaseException:
            with self._free:
                self._count -= 1
                self._free.notify()
            raise

    def release(self, worker: "_Worker") -> None:
        """Return a worker to the pool, closed or not. One idle worker is kept."""
        with self._free:
            if worker.alive and not self._idle:
                self._idle.append(worker)
            else:
                worker.close()
                self._count -= 1
            self._free.notify()

    def close(self) -> None:
        with self._free:
            while self._idle:
                self._idle.pop().close()
                self._count -= 1


class _Worker:
    """One process that renders, see template_worker.py, used by one thread at a time."""

    def __init__(self, setup: bytes) -> None:
        """Start the process without waiting for it. Raises InvalidRequest if that is impossible."""
        self._socket, theirs = socket.socketpair()
        program = str(Path(__file__).with_name("template_worker.py"))
        try:
            with theirs:
                # -P: the current folder may have a jinja2.py. A new session: Ctrl-C must not reach the worker.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", program],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    env=without_secrets() | _RETURN_MEMORY,
                )
        except OSError as error:
            self._socket.close()
            raise InvalidRequest(f"cannot start the process that renders chat templates: {error}", "messages") from None
        self._ready = False
        self._setup = setup
        self.close = weakref.finalize(self, _end, self._socket, self._process, os.getpid())

    @property
    def alive(self) -> bool:
        return self.close.alive and self._process.poll() is None

    def ask(self, request: bytes, seconds: float) -> bytearray:
        """Return the answer to `request`. If it exceeds a limit, end the process and raise InvalidRequest.

        Args:
            seconds: of processor time; it may take twice as long in all.
        """
        try:
            if not self._ready:
                self._exchange(self._setup, _START_SECONDS)
                self._ready = True
            answer = self._exchange(request, 2 * seconds)
        except TimeoutError:
            self.close()
            raise _too_slow(seconds) from None
        except OSError:
            self.close()
            if self._process.returncode == -signal.SIGPROF:
                raise _too_slow(seconds) from None
            raise InvalidRequest("the chat template crashed while it rendered the messages", "messages") from None
        if answer == _OUT_OF_MEMORY:
            self.close()
            raise InvalidRequest("the chat template needs too much memory for these messages", "messages")
        return answer

    def _exchange(self, frame: bytes, seconds: float) -> bytearray:
        """Send a frame and return the answer. Raises OSError if the process ends, and TimeoutError."""
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.sendall(len(frame).to_bytes(8, "little"))
        self._socket.sendall(frame)
        size = int.from_bytes(self._receive(8, deadline), "little")
        if size > MAX_PROMPT_BYTES:
            self.close()
            raise InvalidRequest(f"the chat template made a prompt of over {MAX_PROMPT_BYTES:,} bytes", "messages")
        return self._receive(size, deadline)

    def _receive(self, size: int, deadline: float) -> bytearray:
        received = bytearray(size)
        rest = memoryview(received)
        while rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            count = self._socket.recv_into(rest)
            if not count:
                raise ConnectionResetError
            rest = rest[count:]
        return received


def _end(connection: socket.socket, process: "subprocess.Popen[bytes]", parent: int) -> None:
    connection.close()
    if os.getpid() == parent:  # and not a fork of it
        process.kill()
        process.wait()


def _too_slow(seconds: float) -> InvalidRequest:
    return InvalidRequest(f"the chat template took longer than {seconds:g} s for these messages", "messages")

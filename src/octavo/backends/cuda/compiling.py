"""Compile the kernels of a backend's first steps on all cores, before the steps run.

Steps compile kernels one after the other, each when it is first launched. Here the steps are first gone through without
launching: Triton's hook notes what each would compile. Then threads compile all of it into Triton's cache on disk
(TRITON_CACHE_DIR), where what an earlier start has compiled is found in milliseconds.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import torch
import triton

from octavo.machine import available_cores

log = logging.getLogger("octavo")

_REPORT_SECONDS = 5.0  # between lines of progress

_parse, _parsing = triton.JITFunction.parse, threading.Lock()


def _parse_alone(function: Any) -> Any:
    """Parse a kernel's source while no other thread does.

    CPython 3.11 counts the depth of syntax trees in one place for all threads, and may raise SystemError if two are
    built at once.
    """
    with _parsing:
        return _parse(function)


triton.JITFunction.parse = _parse_alone

Noted = dict[tuple[Any, str], str]
"""What to compile: (function, key of its arguments' types) -> Triton's description of it."""


def compile_kernels(steps: Iterable[Callable[[], object]], device: torch.device, alive: Callable[[], None]) -> None:
    """Compile all kernels that `steps` launch and that this process does not have yet.

    Args:
        steps: each launches kernels on tensors whose contents do not matter.
        alive: called after each kernel.
    """
    with noted() as found:
        for step in steps:
            step()
    compile_noted(found, device, alive)


def compile_noted(found: Noted, device: torch.device, alive: Callable[[], None]) -> None:
    """Compile what was noted, and log the progress if it takes long.

    Raises what Triton raises for a kernel that it cannot compile.
    """
    # In a context of its own, since Triton does not end its AsyncCompileMode after an error.
    contextvars.copy_context().run(_compile_noted, found, device, alive)


def _compile_noted(found: Noted, device: torch.device, alive: Callable[[], None]) -> None:

    def choose_device() -> None:  # a thread's own choice, which Triton reads
        if device.type == "cuda":
            torch.cuda.set_device(device)

    with (
        ThreadPoolExecutor(available_cores(), "octavo-compile", choose_device) as threads,
        triton.AsyncCompileMode(threads) as mode,
    ):
        for (function, _), description in found.items():
            function.preload(description)
        reported = time.monotonic()
        for done, _ in enumerate(as_completed(mode.raw_futures), 1):
            alive()
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                log.warning("compiling kernels, once for this GPU: %d of %d are ready", done, len(mode.raw_futures))


@contextmanager
def noted() -> Iterator[Noted]:
    """Note each kernel that this thread would have to compile, instead of compiling and launching it."""
    found: Noted = {}
    thread, before = threading.get_ident(), triton.knobs.runtime.jit_cache_hook

    def note(*, key: str, fn: Any, compile: dict[str, Any], **others: Any) -> bool | None:
        if threading.get_ident() == thread:
            found[fn.jit_function, key] = compile["specialization_data"]
            return True
        return None if before is None else bool(before(key=key, fn=fn, compile=compile, **others))

    triton.knobs.runtime.jit_cache_hook = note
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = before

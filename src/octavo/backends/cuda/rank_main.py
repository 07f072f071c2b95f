"""The main program of a rank on a GPU: `python -P -m octavo.backends.cuda.rank_main CONNECTION STEPS PAGES`.

RankProcess starts it. CONNECTION leads to its parent (rank_program.Parent); STEPS and PAGES are ends of the streams of
rank_messages.py.
"""

import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from octavo.backends.rank_process import Allocate, Allocated, Join, Joined, Load, Loaded
from octavo.backends.rank_program import Parent, open_model, run_rank
from octavo.model.shard import Shard

from .backend import CudaBackend, load_part, make_part
from .collectives import Group
from .device import find_device
from .rank_messages import Capture, Copy, Read, Step, Stream, Write, decode
from .weights import nbytes

_DONE = b"."


def load(steps: Stream, pages: Stream, message: Load, parent: Parent) -> Callable[[], None]:
    """Load a part of a model. Return the function that follows rank 0."""
    checkpoint, spec, parameters = open_model(message)
    shard, settings = Shard(spec, message.rank, message.size), message.settings
    weights = load_part(shard, parameters, progress=lambda done, total: None, **settings)
    checkpoint.verify()
    parent.send(Loaded(sum(map(nbytes, weights.values())), 0))
    join = parent.next(Join)
    group = Group(message.rank, message.size, join.place, find_device(settings["device"]))
    backend = make_part(shard, weights, group, alive=lambda: None, **settings)
    memory, footprint = backend.memory, backend.footprint
    parent.send(Joined(footprint.step_bytes, memory.total, memory.free, backend.arithmetic, footprint.kernels))
    backend.allocate_pages(parent.next(Allocate).pages)
    parent.send(Allocated())
    return partial(_follow, backend, steps, pages)


def _follow(backend: CudaBackend, steps: Stream, pages: Stream) -> None:
    """Do what rank 0 says, until it hangs up."""
    threading.Thread(target=_serve_pages, args=(backend, pages), name="octavo-pages", daemon=True).start()
    with contextlib.suppress(ConnectionError):
        while True:
            match decode(steps.receive()):
                case Step(batch, only_logits):
                    (backend.logits if only_logits else backend.launch)(batch)
                case Capture(number):
                    backend.capture(number)
                case Copy(source, target):
                    backend.copy_page(source, target)
                    steps.send(_DONE)


def _serve_pages(backend: CudaBackend, pages: Stream) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            match decode(pages.receive()):
                case Read(page):
                    pages.send(backend.export_page(page).tobytes())
                case Write(page, content):
                    backend.import_page(page, np.frombuffer(content, np.uint8))
                    pages.send(_DONE)


if __name__ == "__main__":
    connection, *ends = map(int, sys.argv[1:])
    streams = [Stream(socket.socket(fileno=end)) for end in ends]
    sys.exit(run_rank(connection, partial(load, streams[0], streams[1])))

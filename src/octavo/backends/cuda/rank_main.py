"""The main program of a rank on a GPU: `python -P -m octavo.backends.cuda.rank_main CONNECTION STEPS PAGES PLACE`.

RankProcess starts it. CONNECTION leads to its parent (rank_program.Parent); STEPS and PAGES are ends of the streams of
rank_messages.py; PLACE is that of collectives.Group.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import numpy as np

from octavo.backends.rank_process import Allocate, Allocated, Failed, Join, Joined, Load, Loaded
from octavo.backends.rank_program import Parent, open_model, run_rank
from octavo.errors import OctavoError
from octavo.model.shard import Shard

from .backend import CudaBackend, load_part, make_part
from .collectives import Group
from .device import find_device
from .rank_messages import Capture, Copy, Read, Step, Stream, Write, decode
from .weights import nbytes

log = logging.getLogger("octavo")

_DONE = b"."


def load(steps: Stream, pages: Stream, place: int, message: Load, parent: Parent) -> Callable[[], None]:
    """Load a part of a model. Return the function that follows rank 0."""
    checkpoint, spec, parameters = open_model(message)
    shard, settings = Shard(spec, message.rank, message.size), message.settings
    weights = load_part(shard, parameters, progress=lambda done, total: None, **settings)
    checkpoint.verify()
    parent.send(Loaded(sum(map(nbytes, weights.values())), 0))
    parent.next(Join)
    group = Group(message.rank, message.size, place, find_device(settings["device"]))
    backend = make_part(shard, weights, group, alive=lambda: None, **settings)
    memory, footprint = backend.memory, backend.footprint
    parent.send(Joined(footprint.step_bytes, memory.total, memory.free, backend.arithmetic, footprint.kernels))
    backend.allocate_pages(parent.next(Allocate).pages)
    parent.send(Allocated())
    serve_pages = partial(_serve, partial(_answer_about_pages, backend, pages), parent, message.rank)
    threading.Thread(target=serve_pages, name="octavo-pages", daemon=True).start()
    return partial(_serve, partial(_take_step, backend, steps), parent, message.rank)


def _serve(take_message: Callable[[], None], parent: Parent, rank: int) -> None:
    """Do what rank 0 says, until it hangs up. End this process at an error, for which rank 0 would wait."""
    try:
        while True:
            take_message()
    except ConnectionError:
        pass
    except Exception as error:
        log.error("rank %d has failed: %s", rank, error, exc_info=not isinstance(error, OctavoError))
        parent.send(Failed.of(error, f" (rank {rank})"))
        os._exit(1)


def _take_step(backend: CudaBackend, steps: Stream) -> None:
    match decode(steps.receive()):
        case Step(batch, only_logits):
            (backend.logits if only_logits else backend.launch)(batch)
        case Capture(number):
            backend.capture(number)
        case Copy(source, target):
            backend.copy_page(source, target)
            steps.send(_DONE)


def _answer_about_pages(backend: CudaBackend, pages: Stream) -> None:
    match decode(pages.receive()):
        case Read(page):
            pages.send(backend.export_page(page).tobytes())
        case Write(page, content):
            backend.import_page(page, np.frombuffer(content, np.uint8))
            pages.send(_DONE)


def main(connection: int, steps: int, pages: int, place: int) -> NoReturn:
    ends = (Stream(socket.socket(fileno=end)) for end in (steps, pages))
    code = run_rank(connection, partial(load, next(ends), next(ends), place))
    os._exit(code)  # at once, as freeing NCCL may wait for other ranks


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

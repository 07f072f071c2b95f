"""The main program of a rank: `python -P -m octavo.backends.cpu.rank_main CONNECTION STEPS CALIBRATION KV LINE...`.

RankProcess starts it. CONNECTION is one end of a socket pair, of which its parent has the other: when the parent ends
for any reason, so does this process. The others are the file descriptors of Place.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import msgspec

from octavo.formats.files import MANIFEST, unlock
from octavo.model import describe_model
from octavo.model.shard import Shard
from octavo.process_guard import end_with_parent, hide_memory, lock_memory
from octavo.weights import open_checkpoint

from .backend import load_shard
from .program import Place
from .rank_process import HEARTBEAT, Allocate, Allocated, Failed, FromRank, Load, Loaded, Loading, ToRank, receive

if TYPE_CHECKING:
    from .backend import CpuBackend

log = logging.getLogger("octavo")


def main(connection_fd: int, place: Place) -> int:
    """Load the part that the first message names, and follow rank 0. Return the exit code."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as in the engine process
        signal.signal(ignored, signal.SIG_IGN)
    end_with_parent()
    connection = socket.socket(fileno=connection_fd)
    messages: SimpleQueue[ToRank] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, messages), name="octavo-rank", daemon=True).start()

    def send(message: FromRank) -> None:
        connection.send(msgspec.msgpack.encode(message))

    def beat() -> None:
        with contextlib.suppress(OSError):  # rank 0 has ended
            while not loaded.wait(HEARTBEAT):
                send(Loading())

    loaded = threading.Event()
    threading.Thread(target=beat, name="octavo-heartbeat", daemon=True).start()
    load = messages.get()
    assert isinstance(load, Load)
    try:
        backend = _load(load, place)
        send(Loaded(backend.weight_bytes, backend.footprint.page_bytes))
        allocate = messages.get()
        assert isinstance(allocate, Allocate)
        backend.allocate_kv(allocate.pages)
        send(Allocated())
    except Exception as error:
        send(Failed.of(error, f" (rank {load.rank})"))
        return 1
    loaded.set()
    backend.follow()
    return 0


def _listen(connection: socket.socket, messages: "SimpleQueue[ToRank]") -> None:
    """Take in messages. End this process, whatever it is doing, when rank 0 ends."""
    while (message := receive(connection, ToRank)) is not None:
        messages.put(message)
    os._exit(0)


def _load(load: Load, place: Place) -> "CpuBackend":
    os.sched_setaffinity(0, load.cores)
    path = Path(load.path)
    if load.hide:
        hide_memory()
        if (path / MANIFEST).exists() and (reason := lock_memory()) is not None:
            log.warning("decrypted weights may be swapped to disk, since memory cannot be locked: %s", reason)
    checkpoint = open_checkpoint(unlock(path, load.identity))
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    shard = Shard(spec, load.rank, load.size)
    backend = load_shard(shard, parameters, place, progress=lambda done, total: None, **load.settings)
    checkpoint.verify()
    return backend


if __name__ == "__main__":
    connection, steps, calibration, kv, *lines = map(int, sys.argv[1:])
    sys.exit(main(connection, Place(steps, calibration, kv, tuple(lines))))

"""The main program of an engine process: `python -m octavo.frontend.engine_main ADDRESS`; see engine_process.py."""

import os
import signal
import sys
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import zmq

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_engine
from octavo.errors import OctavoError

from .progress import loading_bar
from .wire import (
    Abort,
    AskStats,
    Failed,
    Load,
    LoadState,
    Pin,
    Ready,
    SaveState,
    StateDone,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    Unpin,
    decode_to_engine,
    encode,
)


def main(address: str) -> None:
    # The frontend decides when this process ends: a Ctrl-C or SIGTERM to the whole group must not cut draining short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loaded: list[Engine] = []
    threading.Thread(target=_end_with_frontend, args=(loaded,), daemon=True).start()
    socket = zmq.Context().socket(zmq.PAIR)
    socket.set_hwm(0)  # nothing is dropped
    socket.connect(address)
    load = decode_to_engine(socket.recv())
    assert isinstance(load, Load)
    try:
        with loading_bar() as progress:
            engine = load_engine(EngineConfig(**load.config), Path(load.path), progress)
    except OctavoError as error:
        socket.send(encode(_failed(error)))
        socket.close()
        return
    loaded.append(engine)
    socket.send(encode(Ready(engine.info)))
    serve(engine, socket)


def serve(engine: Engine, socket: "zmq.Socket[bytes]") -> NoReturn:
    """Step as long as there is work, taking in what has come before each step; sleep when there is none."""
    jobs = StateJobs()
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(jobs.wake, zmq.POLLIN)
    while True:
        while ready := dict(poller.poll(0 if engine.has_work else None)):
            if socket in ready:
                message = decode_to_engine(socket.recv())
                if isinstance(message, AskStats):
                    socket.send(encode(Stats(engine.stats())))
                else:
                    _take_in(message, engine, jobs)
            if jobs.wake in ready:
                engine.end_saves()
                for done in jobs.ended():
                    socket.send(encode(done))
        if outputs := engine.step():
            socket.send(encode(Tokens(outputs)))


class StateJobs:
    """Files of KV states that I/O threads write or open. `wake` can be read when one of them is done."""

    def __init__(self) -> None:
        self.wake = os.eventfd(0)
        self._ended: SimpleQueue[StateDone] = SimpleQueue()

    def watch(self, id: str, job: "Future[Any]") -> None:
        job.add_done_callback(partial(self._end, id))

    def ended(self) -> list[StateDone]:
        os.eventfd_read(self.wake)
        return [self._ended.get() for _ in range(self._ended.qsize())]

    def _end(self, id: str, job: "Future[Any]") -> None:
        error = job.exception()
        self._ended.put(StateDone(id, _failed(error) if error else None))
        os.eventfd_write(self.wake, 1)


def _take_in(message: ToEngine, engine: Engine, jobs: StateJobs) -> None:
    match message:
        case Submit():
            for request in message.requests:
                engine.add(request)
        case Abort():
            engine.abort(message.ids)
        case Pin():
            engine.pin(message.id, message.tokens, message.tenant, message.salt, message.origin)
        case Unpin():
            engine.unpin(message.id)
        case SaveState():
            save = engine.save_state(Path(message.path), message.tokens, message.tenant, message.salt, message.origin)
            jobs.watch(message.id, save)
        case LoadState():
            jobs.watch(message.id, engine.load_state(message.id, Path(message.path)))


def _failed(error: BaseException) -> Failed:
    return Failed(type(error).__name__, str(error))


def _end_with_frontend(loaded: list[Engine]) -> None:
    """Standard input is a pipe that nobody writes to: it ends when the frontend does, kill -9 included."""
    sys.stdin.buffer.read()
    for engine in loaded:
        engine.end_transfers()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])

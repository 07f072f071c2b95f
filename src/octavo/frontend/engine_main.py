"""The main program of an engine process: `python -m octavo.frontend.engine_main ADDRESS`; see engine_process.py."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

import zmq

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_engine
from octavo.errors import OctavoError

from .progress import loading_bar
from .wire import Abort, AskStats, Failed, Load, Ready, Stats, Submit, Tokens, decode_to_engine, encode


def main(address: str) -> None:
    # The frontend decides when this process ends: a Ctrl-C or SIGTERM to the whole group must not cut draining short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_frontend, daemon=True).start()
    socket = zmq.Context().socket(zmq.PAIR)
    socket.set_hwm(0)  # nothing is dropped
    socket.connect(address)
    load = decode_to_engine(socket.recv())
    assert isinstance(load, Load)
    try:
        with loading_bar() as progress:
            engine = load_engine(EngineConfig(**load.config), Path(load.path), progress)
    except OctavoError as error:
        socket.send(encode(Failed(type(error).__name__, str(error))))
        socket.close()
        return
    socket.send(encode(Ready(engine.info)))
    serve(engine, socket)


def serve(engine: Engine, socket: "zmq.Socket[bytes]") -> NoReturn:
    """Step as long as there is work, taking in what has come before each step; sleep when there is none."""
    while True:
        while socket.poll(0 if engine.has_work else None):
            message = decode_to_engine(socket.recv())
            if isinstance(message, Submit):
                for request in message.requests:
                    engine.add(request)
            elif isinstance(message, Abort):
                engine.abort(message.ids)
            elif isinstance(message, AskStats):
                socket.send(encode(Stats(engine.stats())))
        if outputs := engine.step():
            socket.send(encode(Tokens(outputs)))


def _end_with_frontend() -> None:
    """Standard input is a pipe that nobody writes to: it ends when the frontend does, kill -9 included."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])

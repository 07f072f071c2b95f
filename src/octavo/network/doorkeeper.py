"""Doorkeeper: admits only frontends that have the secret."""

from typing import Any

import zmq

from octavo.curve import ZAP, Curve, admission

from .wire import Wire


class Doorkeeper:
    """Answers ZeroMQ's questions whether those who connect to a context's sockets are frontends."""

    def __init__(self, context: "zmq.Context[Any]", curve: Curve):
        self._allowed = curve.frontend[0]
        socket = context.socket(zmq.REP)
        socket.linger = 0
        socket.bind(ZAP)
        self._wire = Wire(socket, self._answer)

    def close(self) -> None:
        self._wire.close()

    def _answer(self, question: list[bytes]) -> None:
        self._wire.send(admission(question, self._allowed))

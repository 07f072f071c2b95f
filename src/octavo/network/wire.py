"""Wire: a ZeroMQ socket on an asyncio loop, without a thread, a future or a task for each message."""

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq

AT_ONCE = 100  # messages that are handled before others get their turn on the loop

log = logging.getLogger("octavo")


class Wire:
    """Delivers what a socket receives to a function, on the running event loop. Owns the socket.

    Args:
        receive: called with the frames of each message. What it raises is logged.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", receive: Callable[[list[bytes]], None]):
        self.socket, self._receive = socket, receive
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.fd)
        self._is_closed = self._is_scheduled = False
        self._loop.add_reader(self._fd, self._take)
        self._schedule()

    def send(self, frames: Sequence[bytes]) -> bool:
        """Queue a message. Return whether there is a peer with room for it."""
        if self._is_closed:
            return False
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:  # no peer, a full queue
            return False
        finally:
            self._schedule()
        return True

    def close(self) -> None:
        """Close the socket. What is still queued is sent if its `linger` allows."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._fd)
            self.socket.close()

    def _schedule(self) -> None:
        """Look for messages soon: the descriptor tells of changes only, and sending may hide one."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._take)

    def _take(self) -> None:
        self._is_scheduled = False
        for _ in range(AT_ONCE):
            if self._is_closed:
                return
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            try:
                self._receive(frames)
            except Exception:
                log.exception("a message from the network could not be handled")
        self._schedule()

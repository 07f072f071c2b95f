"""KV pages of ranks on other nodes: node 0 asks for them, and the nodes answer from the memory of their ranks.

A request is a header, and for a page that is written its content: those of the node's ranks, one after the other. The
answer is the content of a page that is read; or a single byte.
"""

import struct
import threading
from collections.abc import Sequence

import numpy as np

from .node_line import Line

_HEADER = struct.Struct("<cQQ")  # what to do, a page, and for a copy the other page
_READ, _WRITE, _COPY = b"r", b"w", b"c"
_DONE = b"."


class RemotePages:
    """The pages of a node's ranks, as node 0 sees them. May be used by several threads. Raises OSError.

    Args:
        sizes: bytes of a page in each of the ranks.
    """

    def __init__(self, line: Line, sizes: Sequence[int]):
        self._line, self._sizes, self._lock = line, list(sizes), threading.Lock()

    def read(self, page: int) -> list[np.ndarray]:
        """Return a page's content in each rank: uint8 [bytes]."""
        content = np.empty(sum(self._sizes), np.uint8)
        with self._lock:
            self._line.socket.sendall(_HEADER.pack(_READ, page, 0))
            self._line.read_into(content.data)
        return np.split(content, np.cumsum(self._sizes[:-1]))

    def write(self, page: int, parts: Sequence[np.ndarray]) -> None:
        """Replace a page's content in each rank."""
        self._order(_HEADER.pack(_WRITE, page, 0) + b"".join(part.tobytes() for part in parts))

    def copy(self, source: int, target: int) -> None:
        self._order(_HEADER.pack(_COPY, source, target))

    def _order(self, request: bytes) -> None:
        with self._lock:
            self._line.socket.sendall(request)
            self._line.read(len(_DONE))


def serve_pages(line: Line, pools: Sequence[np.ndarray]) -> None:
    """Answer requests until the connection ends, or brings one for a page that is not there; then end it.

    Args:
        pools: those of the node's ranks: uint8 [pages, bytes of a page].
    """
    try:
        while True:
            what, page, target = _HEADER.unpack(line.read(_HEADER.size))
            if max(page, target) >= len(pools[0]):
                break
            if what == _READ:
                line.socket.sendall(b"".join(pool[page].tobytes() for pool in pools))
                continue
            for pool in pools:
                if what == _WRITE:
                    line.read_into(pool[page].data)
                else:
                    pool[target] = pool[page]
            line.socket.sendall(_DONE)
    except OSError:
        pass
    finally:
        line.hang_up()

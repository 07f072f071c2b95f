"""The nodes (machines) other than node 0, over which a model is divided: each runs its ranks for node 0's engine.

A node outlives engines. When one dies, for whatever reason, the node ends its ranks and joins the next one. When one is
closed, the node ends.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from octavo.backends.rank_process import HEARTBEAT, Allocate, Allocated, Failed, Load, Loaded, Loading
from octavo.config import EngineConfig
from octavo.errors import ConfigError, EngineDead
from octavo.formats.files import unlock
from octavo.model import describe_model
from octavo.model.shard import check_size
from octavo.process_guard import hide_memory
from octavo.secret import Secrets
from octavo.weights import fingerprint, open_checkpoint, resolve

from .node_line import HandshakeFailed, Line, Listener, connect
from .node_messages import Form, Formed, Link, LoadNode, RankEnded, Refused, ShutDown, ToNode
from .node_pages import serve_pages
from .nodes import CONNECTING, PATIENCE, Group
from .ranks import Ranks, cores_of

_PAUSE = 0.2  # seconds between attempts to reach node 0

Report = Callable[[str], None]


class _Stopped(Exception):
    """The process is to end, by Ctrl-C or a signal."""


def run_node(config: EngineConfig, report: Report) -> None:
    """Run this node's ranks for one engine after the other, until one is closed, or until Ctrl-C.

    Args:
        report: told in a line what the node does.

    Raises:
        ConfigError: No engine has come in time, or it refuses this node.
        OctavoError: The node's part of the model cannot be loaded.
    """
    path, secrets = resolve(config.model, config.revision), config.read_secrets()
    if secrets:
        hide_memory()
    with _signals():
        node = _Node(config, path, secrets, report)
        while not node.serve(*node.join()):
            pass


class _Node:
    def __init__(self, config: EngineConfig, path: Path, secrets: Secrets, report: Report):
        checkpoint = open_checkpoint(unlock(path, secrets.model_identity))
        spec, _ = describe_model(checkpoint.config, checkpoint.tensors)
        check_size(spec, config.tensor_parallel_size)
        self._config, self._path, self._secrets, self._report = config, path, secrets, report
        self._number, self._size = config.node_rank, config.tensor_parallel_size
        each = self._size // config.nnodes
        self._ranks = range(self._number * each, (self._number + 1) * each)
        self._group = Group.of(config, secrets, fingerprint(checkpoint))

    def join(self) -> tuple[Line, Form, Listener | None, "_Links"]:
        """Wait until node 0's engine has all nodes. Raises ConfigError if none comes, or if it refuses this node."""
        where, deadline = f"{self._group.host}:{self._group.port}", time.monotonic() + PATIENCE
        ranks = f"rank {self._ranks[0]}" if len(self._ranks) == 1 else f"ranks {self._ranks[0]} to {self._ranks[-1]}"
        self._report(f"node {self._number} of {self._group.nodes}, {ranks}: waiting for node 0 at {where}")
        reason = "nobody listens there"
        while time.monotonic() < deadline:
            try:
                line = connect((self._group.host, self._group.port), self._group.key)
            except HandshakeFailed as error:
                raise ConfigError(f"node 0 at {where}: {error}") from None
            except OSError as error:
                reason = error.strerror or str(error)
                time.sleep(_PAUSE)
                continue
            links = _Links()
            listener = self._listen(line, links)
            try:
                line.watch()
                line.send(self._group.join(self._number, self._size, listener.port if listener else 0))
                message = line.receive(ToNode)
            except OSError:
                message = None
            except BaseException:
                _close(line, listener)
                raise
            if isinstance(message, Form):
                return line, message, listener, links
            _close(line, listener)
            if isinstance(message, Refused):
                raise ConfigError(f"node 0 at {where} refuses this node: {message.reason}")
            reason, deadline = line.reason, time.monotonic() + PATIENCE
            time.sleep(_PAUSE)
        raise ConfigError(f"no engine has come for {PATIENCE:g} s: node 0 at {where} cannot be reached ({reason})")

    def _listen(self, line: Line, links: "_Links") -> Listener | None:
        """Return what accepts the connections of nodes with higher numbers; None if there are none.

        It listens where this node is seen from node 0, and nowhere else.
        """
        if self._number == self._group.nodes - 1:
            return None
        return Listener(line.socket.getsockname()[0], 0, self._group.key, Link, links.take)

    def serve(self, line: Line, form: Form, listener: Listener | None, links: "_Links") -> bool:
        """Run the ranks until the engine ends. Return whether it was closed, so that no other will replace it.

        Raises OctavoError if this node cannot load its part.
        """
        opened: list[Line] = []
        try:
            try:
                pages = self._open(form, 0, "pages", opened)
                sums = {node: self._open(form, node, "sums", opened) for node in range(self._number)}
                sums |= links.wait(form.group, range(self._number + 1, self._group.nodes))
                opened += sums.values()
                _close(listener)  # nobody else is waited for
                line.send(Formed())
                load = line.receive(ToNode)
            except (OSError, HandshakeFailed) as error:
                self._report(f"the connections between the nodes have failed: {error}")
                return False
            if not isinstance(load, LoadNode):
                self._report("node 0 has ended while the nodes were connecting")
                return False
            lines = [sums[node].fileno() if node in sums else -1 for node in range(self._group.nodes)]
            ranks = Ranks(self._ranks, self._ranks, self._tell_end(line), lines)
            for each in sums.values():
                each.socket.close()  # the rank has it
            try:
                return self._lead(line, ranks, load, pages)
            finally:
                ranks.end()
        finally:
            _close(line, listener, *opened)

    def _open(self, form: Form, node: int, use: Literal["pages", "sums"], opened: list[Line]) -> Line:
        group = self._group
        line = connect((group.host, group.port) if node == 0 else form.addresses[node - 1], group.key)
        opened.append(line)
        line.send(Link(form.group, self._number, use))
        return line

    def _tell_end(self, line: Line) -> Callable[[int, str], None]:
        def tell(code: int, text: str) -> None:
            self._report(text)
            with contextlib.suppress(OSError):  # node 0 has ended too
                name, _, how = text.partition(" has ended: ")
                line.send(RankEnded(name, code, how))

        return tell

    def _lead(self, line: Line, ranks: Ranks, load: LoadNode, pages: Line) -> bool:
        """Let the ranks load and follow node 0; see `serve`."""
        self._report("all nodes are there: loading")
        messages: SimpleQueue[ToNode | None] = SimpleQueue()
        is_over = threading.Event()
        arguments = (line, messages, ranks, is_over)
        threading.Thread(target=_listen_to, args=arguments, name="octavo-node-0", daemon=True).start()
        try:
            with _heartbeat(line):
                message = self._load(line, ranks, load, pages, messages)
        except Exception as error:
            if is_over.is_set():
                self._report("the engine has ended while it loaded")
                return False
            with contextlib.suppress(OSError):
                line.send(Failed.of(error))
            if isinstance(error, EngineDead):  # a rank has ended; it may not the next time
                return False
            raise
        if isinstance(message, Allocate):
            self._report("serving")
            message = messages.get()
        self._report("the engine was closed" if isinstance(message, ShutDown) else "the engine has ended")
        return isinstance(message, ShutDown)

    def _load(
        self, line: Line, ranks: Ranks, load: LoadNode, pages: Line, messages: "SimpleQueue[ToNode | None]"
    ) -> ToNode | None:
        """Load the parts of the ranks and allocate their KV pools. Return the last message of node 0."""
        settings = load.settings | {"threads": self._config.num_threads}
        for process in ranks.processes:
            cores = sorted(cores_of(process.rank - self._ranks.start, len(self._ranks)))
            identity, hide = self._secrets.model_identity, bool(self._secrets)
            process.send(Load(str(self._path), identity, hide, process.rank, self._size, cores, settings))
        loaded = ranks.wait()
        weights, size = sum(each.weight_bytes for each in loaded), sum(each.page_bytes for each in loaded)
        line.send(Loaded(weights, size))
        message = messages.get()
        if isinstance(message, Allocate):
            ranks.send(message)
            ranks.wait()
            pools = ranks.map_pools(message.pages, [each.page_bytes for each in loaded])
            threading.Thread(target=serve_pages, args=(pages, pools), name="octavo-pages", daemon=True).start()
            line.send(Allocated())
        return message


class _Links:
    """The connections of nodes with higher numbers. Other threads add to them."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, int], Line] = {}
        self._changed = threading.Condition()

    def take(self, line: Line, link: Link, address: str) -> None:
        with self._changed:
            self._lines[link.group, link.node] = line
            self._changed.notify_all()

    def wait(self, group: str, nodes: range) -> dict[int, Line]:
        """Return the connection of each of some nodes. Raises OSError if one does not come."""
        with self._changed:
            if not self._changed.wait_for(lambda: all((group, node) in self._lines for node in nodes), CONNECTING):
                raise TimeoutError("another node has not connected to this one")
            return {node: self._lines[group, node] for node in nodes}


def _listen_to(line: Line, messages: "SimpleQueue[ToNode | None]", ranks: Ranks, is_over: threading.Event) -> None:
    """Take in messages of node 0. When it ends or closes the engine, end the ranks."""
    message: ToNode | None = Form("", [])
    while message is not None:
        message = line.receive(ToNode)
        if message is None or isinstance(message, ShutDown):
            is_over.set()
            ranks.stop()
        messages.put(message)


@contextlib.contextmanager
def _heartbeat(line: Line) -> Iterator[None]:
    """Send signs of life, since loading may take long."""
    done = threading.Event()

    def beat() -> None:
        with contextlib.suppress(OSError):  # node 0 has ended
            while not done.wait(HEARTBEAT):
                line.send(Loading())

    threading.Thread(target=beat, name="octavo-heartbeat", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _close(*closables: Line | Listener | None) -> None:
    for each in closables:
        if each is not None:
            each.close()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """End the block at SIGINT, SIGTERM or SIGHUP."""

    def stop(number: int, frame: object) -> None:
        raise _Stopped

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    except _Stopped:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

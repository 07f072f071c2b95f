"""The other nodes (machines) over which a model is divided, as node 0 sees them. Node 0 listens, and the others come.

node_main.py is their side, node_messages.py what both say, node_line.py how they prove that they belong together.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.address import Address
from octavo.backends.rank_process import FromRank, Member, Settings
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.secret import Secrets
from octavo.version import __version__

from .node_line import Line, Listener
from .node_messages import First, Form, Formed, FromNode, Join, Link, LoadNode, RankEnded, Refused, ShutDown, ToNode
from .node_pages import RemotePages
from .program import choose_isa, kernels_build

PATIENCE = 120.0  # seconds for all nodes to come
CONNECTING = 30.0  # seconds for nodes to connect to each other
_TOLD_AFTER = 2.0  # seconds of waiting that need no word

log = logging.getLogger("octavo")


@dataclass(frozen=True)
class Group:
    """What all nodes of a model know of each other.

    Attributes:
        nodes: their number.
        host, port: where node 0 listens until all others have come.
        key: the secret that they share; b"" without one.
        model: fingerprint of the model's files.
    """

    nodes: int
    host: str
    port: int
    key: bytes
    model: str

    @classmethod
    def of(cls, config: EngineConfig, secrets: Secrets, model: str) -> "Group":
        """Return what the settings say. Raises ConfigError if others could join for lack of a secret."""
        is_local = config.master_addr == "localhost" or Address(config.master_addr, config.master_port).is_local
        if secrets.nodes_key is None and not is_local:
            raise ConfigError(
                f"master_addr {config.master_addr} can be reached from other machines: give all nodes the same secret, "
                "--secret-file FILE"
            )
        key = bytes.fromhex(secrets.nodes_key or "")
        return cls(config.nnodes, config.master_addr, config.master_port, key, model)

    def join(self, node: int, ranks: int, port: int = 0) -> Join:
        """Return what a node says of itself."""
        return Join(__version__, node, self.nodes, ranks, self.model, kernels_build(), choose_isa(), port)


class RemoteNode(Member):
    """A node that has joined, and that loads the parts of its ranks.

    Args:
        address: where it has come from.

    Attributes:
        pages, sums: its further connections, once it has formed the group with the others.
    """

    pages: Line
    sums: Line

    def __init__(self, join: Join, line: Line, address: str):
        super().__init__(f"node {join.node} ({address})")
        self.number, self.address, self.port, self.line = join.node, address, join.port, line
        self._rank: RankEnded | None = None

    def fileno(self) -> int:
        return self.line.fileno()

    def send(self, message: ToNode) -> None:
        with contextlib.suppress(OSError):
            self.line.send(message)

    def load(self, settings: Settings) -> None:
        self.send(LoadNode(settings))

    def shut_down(self) -> None:
        self.send(ShutDown())

    def pages_of(self, sizes: Sequence[int]) -> RemotePages:
        """Return the node's KV pages. `sizes`: bytes of a page in each of its ranks."""
        return RemotePages(self.pages, sizes)

    def receive(self) -> FromRank | None:
        message: FromNode | None = self.line.receive(FromNode)
        if isinstance(message, RankEnded):
            self._rank, self.name = message, f"{message.name} on {self.name}"
        return None if isinstance(message, RankEnded | Formed) else message

    def wait(self) -> tuple[int, str]:
        if self._rank is not None:
            return self._rank.code, self._rank.how
        return -signal.SIGKILL, self.line.reason  # which is no fault of what the ranks compute

    def hang_up(self) -> None:
        for line in (self.line, self.pages, self.sums):
            line.hang_up()

    def end(self) -> None:
        for line in (self.line, self.pages, self.sums):
            line.close()


def form(group: Group, ranks: int) -> list[RemoteNode]:
    """Wait until all other nodes have joined and are connected to each other; return them in order.

    Raises ConfigError if one does not come.
    """
    forming = _Forming(group, group.join(0, ranks))
    try:
        return forming.run()
    except BaseException:
        forming.give_up()
        raise
    finally:
        forming.listener.close()


class _Forming:
    """The nodes that have come so far. Other threads add to them."""

    def __init__(self, group: Group, own: Join):
        self._own, self._name = own, os.urandom(16).hex()
        self._joined: dict[int, RemoteNode] = {}
        self._links: dict[tuple[int, str], Line] = {}
        self._refusal = ""  # the last one
        self._changed = threading.Condition()
        self.listener = Listener(group.host, group.port, group.key, First, self._take)

    def run(self) -> list[RemoteNode]:
        others = range(1, self._own.nodes)
        with self._changed:
            self._wait_for_nodes(others)
            nodes = [self._joined[number] for number in others]
        for node in nodes:
            node.send(Form(self._name, [(other.address, other.port) for other in nodes]))
        deadline = time.monotonic() + CONNECTING
        wanted = [(number, use) for number in others for use in ("pages", "sums")]
        with self._changed:
            has_all = self._changed.wait_for(lambda: all(link in self._links for link in wanted), CONNECTING)
        for node in nodes:
            if not has_all or not isinstance(node.line.receive(FromNode, deadline), Formed):
                raise ConfigError(f"{node.name} has joined, but cannot connect to all other nodes")
            node.pages, node.sums = self._links[node.number, "pages"], self._links[node.number, "sums"]
        return nodes

    def give_up(self) -> None:
        for line in (*(node.line for node in self._joined.values()), *self._links.values()):
            line.close()

    def _wait_for_nodes(self, others: range) -> None:
        began, is_told = time.monotonic(), False
        while missing := [number for number in others if number not in self._joined]:
            waited = time.monotonic() - began
            which = f"node {missing[0]}" if len(missing) == 1 else f"nodes {', '.join(map(str, missing))}"
            if waited > PATIENCE:
                raise ConfigError(
                    f"{which} of {len(others) + 1} did not come within {PATIENCE:g} s{self._refusal}; start the same "
                    "command on each machine, with its own --node-rank"
                )
            if waited > _TOLD_AFTER and not is_told:
                is_told = True
                log.warning("waiting for %s of %d: start the same command there", which, len(others) + 1)
            self._changed.wait(0.5)
            for number, node in list(self._joined.items()):
                if node.line.has_ended:
                    self._joined.pop(number).line.close()

    def _take(self, line: Line, message: First, address: str) -> None:
        """Take in a new connection. Called in a thread of its own."""
        with self._changed:
            if isinstance(message, Link):
                if message.group == self._name:
                    self._links[message.node, message.use] = line
                else:  # of a group that was formed before
                    line.close()
            elif problem := self._problem(message):
                self._refusal = f" (node {message.node} at {address} was refused: {problem})"
                log.warning("node %d at %s is refused: %s", message.node, address, problem)
                with contextlib.suppress(OSError):  # it has hung up
                    line.send(Refused(problem))
                line.close()
            else:
                line.watch()
                self._joined[message.node] = RemoteNode(message, line, address)
            self._changed.notify_all()

    def _problem(self, join: Join) -> str | None:
        if problem := self._own.problem(join):
            return problem
        before = self._joined.get(join.node)
        if before is not None and not before.line.has_ended:
            return f"another {before.name} has come before; give each node its own --node-rank"
        return None

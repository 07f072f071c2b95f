"""The messages between node 0, whose engine leads, and the other nodes (machines) over which a model is divided.

Each node has three connections to node 0. Over the first come these messages, for loading and for the end. The second
carries pages (node_pages.py), the third what ranks exchange in a step (csrc/runtime/node_lines.h), as between any two
nodes.
"""

from typing import Literal

import msgspec

from octavo.backends.rank_process import Allocate, Allocated, Failed, Loaded, Loading, Settings
from octavo.errors import shortened


class Join(msgspec.Struct, frozen=True, tag=True):
    """Take part as a node.

    Attributes:
        version: of Octavo.
        node, nodes, ranks: its number, and the numbers of nodes and of ranks that it was started with.
        model: fingerprint of the model's files.
        build: hash of the native kernels.
        isa: their instruction set.
        port: where it accepts connections of nodes with higher numbers; 0 if there are none.
    """

    version: str
    node: int
    nodes: int
    ranks: int
    model: str
    build: str
    isa: str
    port: int = 0

    def problem(self, other: "Join") -> str | None:
        """Return why a node cannot take part, or None. `self` is node 0's."""
        if other.version != self.version:
            return (
                f"it runs Octavo {shortened(other.version)}, and node 0 runs {self.version}; install the same version"
            )
        if (other.nodes, other.ranks) != (self.nodes, self.ranks):
            return (
                f"it was started with nnodes {other.nodes} and tensor_parallel_size {other.ranks}, and node 0 with "
                f"{self.nodes} and {self.ranks}; give all nodes the same"
            )
        if not 0 < other.node < self.nodes:
            return f"it says that it is node {other.node}, and there are nodes 1 to {self.nodes - 1}"
        if other.model != self.model:
            return "it has another model than node 0; give all nodes the same files"
        if other.isa != self.isa:
            return (
                f"its kernels are for {shortened(other.isa)}, and those of node 0 for {self.isa}, which round "
                "differently; set OCTAVO_ISA to an instruction set of both on all nodes"
            )
        if other.build != self.build:
            return "its kernels are another build than those of node 0; install the same package"
        return None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The node may not take part."""

    reason: str


class Form(msgspec.Struct, frozen=True, tag=True):
    """All nodes are there: connect to node 0 and to those with lower numbers, and answer with Formed.

    Attributes:
        group: a random number that names this group of nodes.
        addresses: host and port of nodes 1, 2 ...
    """

    group: str
    addresses: list[tuple[str, int]]


class Formed(msgspec.Struct, frozen=True, tag=True):
    """The node has all its connections."""


class Link(msgspec.Struct, frozen=True, tag=True):
    """Say what a further connection of a node is for."""

    group: str
    node: int
    use: Literal["pages", "sums"]


class LoadNode(msgspec.Struct, frozen=True, tag=True):
    """Load the parts of the node's ranks.

    Attributes:
        settings: the arguments of load_shard, of which each node chooses the number of threads by itself.
    """

    settings: Settings


class RankEnded(msgspec.Struct, frozen=True, tag=True):
    """A rank of the node has ended by itself: its exit code, and how in words."""

    name: str
    code: int
    how: str


class ShutDown(msgspec.Struct, frozen=True, tag=True):
    """The engine was closed, so that no other one will replace it."""


First = Join | Link
ToNode = Refused | Form | LoadNode | Allocate | ShutDown
FromNode = Formed | Loading | Loaded | Allocated | Failed | RankEnded

"""The further nodes of an engine that is divided over several: each runs its ranks, as an actor of Ray."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from octavo.config import EngineConfig

from .cluster_secret import secret_source

log = logging.getLogger("octavo")


class Node:
    """The part of an engine that runs on one further node.

    Args:
        settings: of the EngineConfig, with `node_rank`, `master_addr` and `master_port`.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self._config = EngineConfig.from_keywords(**settings, secret_file=secret_source())

    def run(self) -> None:
        """Run the ranks for one engine after the other, until one is closed. Raises OctavoError."""
        from octavo.backends.cpu.node_main import run_node

        run_node(self._config, log.info)


def start_nodes(settings: Mapping[str, Any], nnodes: int) -> list["asyncio.Task[None]"]:
    """Start the nodes 1 to `nnodes` - 1 of an engine, each in the bundle of this number of the placement group.

    Ray ends them with the process that calls this.

    Args:
        settings: of the EngineConfig, with `master_addr` and `master_port`.

    Returns:
        A task for each node, which is done when the node has ended.
    """
    group = ray.util.get_current_placement_group()
    assert group is not None, "an engine of several nodes is a replica with a placement group"
    resources = {name: count for name, count in group.bundle_specs[0].items() if name not in ("CPU", "GPU")}
    cpus = group.bundle_specs[0].get("CPU", 0)
    tasks = []
    for number in range(1, nnodes):
        bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        place = {"num_cpus": cpus, "resources": resources, "scheduling_strategy": bundle}
        node = ray.remote(Node).options(**place).remote({**settings, "node_rank": number})
        tasks.append(asyncio.create_task(_run(node)))
    return tasks


async def _run(node: Any) -> None:
    await node.run.remote()

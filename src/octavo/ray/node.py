"""The further nodes of an engine that is divided over several: each runs its ranks, as an actor of Ray."""

import asyncio
import logging
from dataclasses import replace
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
        config: of the engine, with the number of this node.
    """

    def __init__(self, config: EngineConfig):
        self._config = config

    def run(self) -> None:
        """Run the ranks for one engine after the other, until one is closed. Raises OctavoError."""
        from octavo.backends.cpu.node_main import run_node

        secret_source()  # which `config` names
        run_node(self._config, log.info)


def start_nodes(config: EngineConfig) -> list["asyncio.Task[None]"]:
    """Start the nodes of an engine other than the first, each in the bundle of its number in the placement group.

    Ray ends them with the process that calls this.

    Returns:
        A task for each node, which is done when the node has ended.
    """
    if config.nnodes == 1:
        return []
    group = ray.util.get_current_placement_group()
    assert group is not None, "an engine of several nodes is a replica with a placement group"
    resources = dict(group.bundle_specs[0])
    place = {"num_cpus": resources.pop("CPU", 0), "resources": resources}
    tasks = []
    for number in range(1, config.nnodes):
        bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        actor = ray.remote(Node).options(**place, scheduling_strategy=bundle)
        tasks.append(asyncio.create_task(_run(actor.remote(replace(config, node_rank=number)))))
    return tasks


async def _run(node: Any) -> None:
    await node.run.remote()

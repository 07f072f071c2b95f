"""Octavo on a real Ray cluster: three nodes in network namespaces, the application of docs/ray.md, a lost node."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'octavo[ray]'")

from ray_cluster import RayCluster, missing, ray_cluster

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(400),
]

SERVE = """
import sys
import ray
from ray import serve
from octavo.ray import Autoscaling, app
ray.init(logging_level="ERROR")
serve.start(http_options={"host": "0.0.0.0", "port": 8000})
settings = {"model": sys.argv[1], "served_model_name": "tiny", "threads": 1, "kv_cache_memory": "100MiB"}
settings |= eval(sys.argv[3])
service = app(settings, eval(sys.argv[2]), frontend_actor={"resources": {"head": 1}})
serve.run(service, name="octavo", route_prefix="/")
sys.stdout.write("\\nserving\\n")
sys.stdout.flush()
for question in sys.stdin:
    states = serve.status().applications["octavo"].deployments["engines of tiny"].replica_states
    sys.stdout.write(f"\\nengines {states.get('RUNNING', 0)}\\n")  # at once, since Ray's threads write too
    sys.stdout.flush()
"""
LOAD = Path(__file__).parents[1] / "support" / "steady_streams.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head without CPUs, which has the frontend, and two nodes for engines."""
    with ray_cluster([0, 2, 2]) as cluster:
        yield cluster


class Service:
    """The application, and a user of the cluster who deployed it and watches it."""

    def __init__(self, cluster: RayCluster, model: Path, scaling: str, settings: str = "{}"):
        self._cluster, self._user = cluster, cluster.popen(SERVE, str(model), scaling, settings)
        read_until(self._user, "serving")

    def num_engines(self) -> int:
        assert self._user.stdin is not None
        self._user.stdin.write("?\n")
        self._user.stdin.flush()
        return int(read_until(self._user, "engines").split()[1])

    def until_engines(self, count: int) -> None:
        deadline = time.monotonic() + 90
        while (found := self.num_engines()) != count:
            assert time.monotonic() < deadline, f"{found} engines, not {count}"
            time.sleep(0.2)

    def streams(self, count: int) -> subprocess.Popen[str]:
        """Begin to send requests. Returns when all clients have had tokens."""
        words = (f"http://{self._cluster.ip(0)}:8000", str(count))
        command = self._cluster.machines.command(0, sys.executable, str(LOAD), *words)
        load = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        read_until(load, "streaming")
        return load


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line
    raise AssertionError(f"the process ended with {process.wait()} before it said {word!r}")


def ended(load: subprocess.Popen[str]) -> dict[str, int]:
    """Let the clients end. Returns how their streams ended."""
    result: dict[str, int] = json.loads(load.communicate(timeout=200)[0])
    return result


def test_a_lost_node_loses_no_stream(cluster: RayCluster, tiny_llama: Path) -> None:
    service = Service(cluster, tiny_llama, "Autoscaling(min_engines=2, max_engines=2)")
    load = service.streams(8)
    cluster.kill(2)
    service.until_engines(1)
    service.until_engines(2)
    result = ended(load)
    assert result["whole"] >= 8
    assert result == {"whole": result["whole"]}


@pytest.mark.exhaustive
def test_engines_follow_the_load(cluster: RayCluster, tiny_llama: Path) -> None:
    scaling = "Autoscaling(min_engines=0, max_engines=2, requests=2, up_delay=1, down_delay=8)"
    service = Service(cluster, tiny_llama, scaling)
    load = service.streams(8)
    service.until_engines(2)
    result = ended(load)
    assert result == {"whole": result["whole"]}
    service.until_engines(0)
    assert ended(service.streams(1))["whole"] >= 1  # an engine is started for it


@pytest.mark.exhaustive
def test_one_engine_becomes_three_and_one_again(tiny_llama: Path) -> None:
    """While the load rises and falls, streams begin and end; none of them is refused or cut."""
    scaling = "Autoscaling(min_engines=1, max_engines=3, requests=3, up_delay=1, down_delay=5)"
    with ray_cluster([0, 2, 2]) as cluster:
        service = Service(cluster, tiny_llama, scaling)
        steady = service.streams(2)
        service.until_engines(1)
        more = service.streams(6)
        service.until_engines(3)
        rise = ended(more)
        service.until_engines(1)
        fall = ended(steady)
    assert rise == {"whole": rise["whole"]}
    assert fall == {"whole": fall["whole"]}


def test_an_engine_of_two_nodes(tiny_llama: Path) -> None:
    """Its streams wait while one of the nodes is lost, and go on when the cluster has another one."""
    with ray_cluster([0, 1, 1]) as cluster:
        scaling = "Autoscaling(min_engines=1, max_engines=1)"
        service = Service(cluster, tiny_llama, scaling, "{'tensor_parallel_size': 2, 'nnodes': 2}")
        load = service.streams(4)
        runs = cluster.machines.runs
        engine, ranks = ([node for node in (1, 2) if runs(node, part)] for part in (b"engine_main", b"rank_main"))
        assert len(engine) == len(ranks) == 1 and engine != ranks
        cluster.kill(2)
        service.until_engines(0)
        cluster.start(2, cpus=1)
        service.until_engines(1)
        result = ended(load)
    assert result["whole"] >= 4
    assert result == {"whole": result["whole"]}

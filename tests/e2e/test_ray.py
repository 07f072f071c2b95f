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

DEPLOY = """
import sys
import ray
from ray import serve
from octavo.ray import Autoscaling, app
ray.init(logging_level="ERROR")
serve.start(http_options={"host": "0.0.0.0", "port": 8000})
settings = {"model": sys.argv[1], "served_model_name": "tiny", "threads": 1, "kv_cache_memory": "100MiB"}
service = app(settings, eval(sys.argv[2]), frontend_actor={"resources": {"head": 1}})
serve.run(service, name="octavo", route_prefix="/")
"""
ENGINES = """
import ray
from ray import serve
ray.init(logging_level="ERROR")
states = serve.status().applications["octavo"].deployments["engines of tiny"].replica_states
print("engines", states.get("RUNNING", 0))
"""
LOAD = Path(__file__).parents[1] / "support" / "steady_streams.py"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head without CPUs, which has the frontend, and two nodes for engines."""
    with ray_cluster(tmp_path_factory.mktemp("ray"), [0, 2, 2]) as cluster:
        yield cluster


def num_engines(cluster: RayCluster) -> int:
    [line] = [line for line in cluster.run(ENGINES).splitlines() if line.startswith("engines")]
    return int(line.split()[1])


def until_engines(cluster: RayCluster, count: int) -> None:
    deadline = time.monotonic() + 90
    while (found := num_engines(cluster)) != count:
        assert time.monotonic() < deadline, f"{found} engines, not {count}"


def streams(cluster: RayCluster, count: int, seconds: float) -> subprocess.Popen[str]:
    words = (f"http://{cluster.ip(0)}:8000", str(count), str(seconds))
    return subprocess.Popen(cluster.command(0, sys.executable, str(LOAD), *words), stdout=subprocess.PIPE, text=True)


def ended(load: subprocess.Popen[str]) -> dict[str, int]:
    result: dict[str, int] = json.loads(load.communicate(timeout=200)[0])
    return result


def test_a_lost_node_loses_no_stream(cluster: RayCluster, tiny_llama: Path) -> None:
    cluster.run(DEPLOY, str(tiny_llama), "Autoscaling(min_engines=2, max_engines=2)")
    load = streams(cluster, 8, 25)
    time.sleep(8)  # of the streams' 25 seconds
    cluster.kill(2)
    result = ended(load)
    assert result["whole"] > 8
    assert result == {"whole": result["whole"]}
    until_engines(cluster, 2)


@pytest.mark.slow
def test_engines_follow_the_load(cluster: RayCluster, tiny_llama: Path) -> None:
    scaling = "Autoscaling(min_engines=0, max_engines=2, requests=4, up_delay=1, down_delay=4)"
    cluster.run(DEPLOY, str(tiny_llama), scaling)
    load = streams(cluster, 8, 40)
    seen = set()
    while load.poll() is None:
        seen.add(num_engines(cluster))
    result = ended(load)
    assert result == {"whole": result["whole"]}
    assert 2 in seen
    until_engines(cluster, 0)
    assert ended(streams(cluster, 1, 1))["whole"] >= 1  # an engine is started for it

"""Batch enrichment on a real Ray cluster whose nodes and drivers are lost, compared with `octavo enrich`."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'octavo[ray]' pandas pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from command_line import octavo
from ray_cluster import RayCluster, missing, ray_cluster

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(400),
    pytest.mark.slow,
]

ROWS = 2000
PROMPT = "What is {text}?"
ENRICH = """
import sys, time
import ray.data
from octavo.ray import enrich
ray.init(logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[5]):
    time.sleep(0.1)
ray.data.DataContext.get_current().enable_progress_bars = False
model = {"model": sys.argv[3], "threads": 1, "kv_cache_memory": "50MiB"}
table = ray.data.read_parquet(sys.argv[1])
options = dict(engines=(1, 2), sampling={"max_tokens": 8}, batch_rows=32)
rows = enrich(table, sys.argv[2], sys.argv[4], id_column="id", model=model, **options)
sys.stdout.write(f"\\nrows {rows}\\n")  # at once, since Ray's threads write too
"""


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with ray_cluster([1, 1, 1]) as cluster:
        yield cluster


def until_files(folder: Path, count: int, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while len(list(folder.glob("*.parquet"))) < count:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_row_is_written_once(cluster: RayCluster, tiny_llama: Path, tmp_path: Path) -> None:
    source, result, expected = tmp_path / "source.parquet", tmp_path / "result", tmp_path / "expected.parquet"
    pq.write_table(pa.table({"id": range(ROWS), "text": [f"number {i}" for i in range(ROWS)]}), source)
    words = (str(source), str(result), str(tiny_llama), PROMPT)

    driver = cluster.popen(ENRICH, *words, "3")
    until_files(result, 2, driver)
    cluster.kill(2)
    until_files(result, len(list(result.glob("*.parquet"))) + 2, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = pq.read_table(result).num_rows
    assert 0 < before < ROWS

    said, _ = cluster.popen(ENRICH, *words, "2").communicate(timeout=240)
    [answered] = map(int, re.findall(r"^rows (\d+)$", said, re.MULTILINE))
    assert 0 < answered <= ROWS - before

    done = octavo(
        "enrich", source, "--model", tiny_llama, "--prompt", PROMPT, "--output", expected, "--max-tokens", "8"
    )
    assert done.returncode == 0, done.stderr
    assert pq.read_table(result).sort_by("id").equals(pq.read_table(expected))
    assert not list(result.glob(".*"))

"""octavo doctor as a user runs it: what is fine, what to change, what stops Octavo."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Terminal, octavo
from control_group import JOIN, control_group
from octavo import EngineConfig
from octavo.doctor import host, installation, places
from octavo.doctor.finding import Finding
from octavo.server.config import ServerConfig
from redis_process import redis_server

GIB = 2**30
LINE = re.compile(r"(?:✓ fine  |! change|✗ stops ) {2}(\S[\w ]{10,}?)  (\S.*)")
SUBJECTS = [
    *("Python", "packages", "machine", "kernels", "cores", "memory", "huge pages", "limits", "GPU", "port"),
    *("clients", "data folder", "model cache"),
]


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def examine(*arguments: str | Path, code: int = 0, **environment: str) -> dict[str, str]:
    """Run octavo doctor; returns its lines by subject."""
    done = octavo("doctor", *arguments, **environment)
    assert (done.returncode, done.stderr) == (code, ""), done
    lines = {}
    for line in done.stdout.splitlines():
        match = LINE.fullmatch(line)
        assert match, line
        lines[match[1].strip()] = line
    return lines


def test_each_check_is_one_plain_line() -> None:
    lines = examine("--port", "0")
    assert list(lines) == SUBJECTS
    assert f"CPython {sys.version.split()[0]}" in lines["Python"]
    assert not any("\x1b" in line for line in lines.values())


def test_a_model_that_loads(folder: Path) -> None:
    flags = ("--max-model-len", "64", "--max-batch-size", "3", "--port", "0")
    lines = examine(folder, *flags)
    assert list(lines) == [*SUBJECTS, "model", "weights", "KV cache", "contexts"]
    assert f"can be loaded from {folder}" in lines["model"]
    assert "6 pages of 32 tokens" in lines["KV cache"]
    assert "3 of 64 tokens fit" in lines["contexts"]


@pytest.mark.parametrize("settings", [{}, {"quantization": "8bit", "kv_cache_dtype": "int8"}, {"backend": "torch"}])
def test_the_plan_is_what_the_engine_decides(folder: Path, settings: dict[str, str]) -> None:
    """The plan is made without weights; the engine's is made with them."""
    from octavo.engine.loading import load_engine, plan_engine

    config = EngineConfig(model=str(folder), max_batch_size=2, **settings)
    engine = load_engine(config, folder)
    assert plan_engine(config, folder) == engine.plan == engine.info.plan
    assert engine.plan and engine.plan.num_pages == engine.kv.pool.num_pages
    engine.close()


def test_a_taken_port_stops_octavo() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert f"✗ stops   port         port {port} on 127.0.0.1 is in use" in examine("--port", port, code=1)["port"]
    assert f"{port} on 127.0.0.1 is free" in examine(OCTAVO_PORT=port)["port"]


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("absent", (), "no model 'absent'"),
        ("owner/absent", (), "has not been downloaded yet: octavo pull"),
        (None, ("--max-model-len", "99999999"), "max_model_len must be at most"),
        (None, ("--kv-cache-memory", "1KiB"), "set kv_cache_memory to at least"),
        (None, ("--scheduling-policy", "absent.module:Policy"), "absent.module"),
    ],
)
def test_a_model_that_does_not_load(
    model: str | None, flags: tuple[str, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    lines = examine(model or folder, *flags, "--port", "0", code=1, HF_HOME=str(tmp_path))
    assert lines["model"].startswith("✗ stops") and message in lines["model"]
    assert "weights" not in lines


def test_a_kv_cache_too_small_for_a_whole_context(folder: Path) -> None:
    page = octavo_page_bytes(folder)
    lines = examine(folder, "--port", "0", "--kv-cache-memory", str(2 * page))
    assert lines["contexts"].startswith("! change") and "a request may have 64 tokens" in lines["contexts"]


def octavo_page_bytes(folder: Path) -> int:
    from octavo.engine.loading import plan_engine

    return plan_engine(EngineConfig(model=str(folder)), folder).page_bytes


def test_a_wrong_setting_is_one_line() -> None:
    done = octavo("doctor", "--max-batch-size", "none")
    assert done.returncode == 2 and re.fullmatch(r"octavo: max_batch_size must be [^\n]+\n", done.stderr)


def test_the_limits_of_a_real_group(folder: Path) -> None:
    script = (
        f"{JOIN}\nsys.argv = ['octavo', 'doctor', {str(folder)!r}, '--port', '0']\nfrom octavo.cli import main; main()"
    )
    with control_group(processors=0.5, memory=GIB) as environment:
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True, text=True, timeout=60, env=os.environ | environment,
        )  # fmt: skip
    assert done.returncode == 0, done
    assert "(the control group allows 0.5): the threads are suspended" in done.stdout
    assert "free of the 1.00 GiB that the control group allows" in done.stdout


def test_colors_on_a_terminal_only() -> None:
    terminal = Terminal("doctor", "--port", "0")
    try:
        terminal.wait_for("\x1b\\[32m✓ fine")
    finally:
        terminal.close()
        terminal.process.wait(timeout=20)


def test_a_terminal_without_the_marks() -> None:
    done = octavo("doctor", "--port", "0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "fine    Python" in done.stdout


def level(finding: Finding) -> str:
    return finding.level


def patched(monkeypatch: pytest.MonkeyPatch, **results: object) -> None:
    for name, result in results.items():
        monkeypatch.setattr(host, name, lambda result=result: result)


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    affinity = len(os.sched_getaffinity(0))
    patched(monkeypatch, physical_cores=affinity)
    assert level(host._cores(EngineConfig())) == "ok"
    many = host._cores(EngineConfig(threads=affinity + 1))
    assert level(many) == "change" and f"--threads to {affinity} or less" in many.text
    patched(monkeypatch, available_cores=2, physical_cores=1)
    threads = host._cores(EngineConfig())
    assert level(threads) == "change" and "--threads 1" in threads.text
    assert level(host._cores(EngineConfig(threads=1))) == "ok"


def test_memory_and_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, available_memory=GIB // 4, memory_limit=None)
    assert level(host._memory()) == "stop"
    for mode, expected in (("never", "change"), ("", "change"), ("always", "ok")):
        patched(monkeypatch, huge_pages=mode)
        assert level(host._huge_pages()) == expected


def test_open_files() -> None:
    few = host._limits(ServerConfig(max_connections=2**31))
    assert level(few) in ("ok", "change")  # "ok" where files are unlimited
    assert level(host._limits(ServerConfig(max_connections=1))) == "ok"


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_ISA", "mmx")
    assert level(host._instruction_set()) == "stop"
    monkeypatch.setenv("OCTAVO_ISA", "portable")
    assert level(host._instruction_set()) in ("change", "ok")
    monkeypatch.delenv("OCTAVO_ISA")
    assert "the best" in host._instruction_set().text


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patched(monkeypatch, _gpu_names=[])
    assert level(host._gpu(EngineConfig())) == "ok"
    assert level(host._gpu(EngineConfig(backend="torch", device="cuda"))) == "stop"
    patched(monkeypatch, _gpu_names=["NVIDIA Abacus"])
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: object())
    assert level(host._gpu(EngineConfig(device="cuda"))) == "ok"
    assert level(host._gpu(EngineConfig(device="cuda", tensor_parallel_size=2))) == "stop"
    monkeypatch.undo()
    (tmp_path / "0000:01").mkdir()
    (tmp_path / "0000:01" / "information").write_text("Model: \t\t NVIDIA Abacus\nIRQ:   36\n")
    assert host._gpu_names(tmp_path) == ["NVIDIA Abacus"]


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert level(installation._packages()) == "ok"
    wanted = ["numpy>=99", "absent-package>=1; extra == 'cli'", "octavo[cli]; extra == 'server'", "x; extra == 'test'"]
    monkeypatch.setattr(installation, "requires", lambda name: wanted)
    found = installation._packages()
    assert level(found) == "stop" and "numpy>=99 (2." in found.text and "absent-package>=1" in found.text
    assert "x;" not in found.text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "ok"), ({"host": "0.0.0.0"}, "change"), ({"host": ""}, "change"), ({"host": "", "api_key": ["k"]}, "ok")],
)
def test_who_is_served(settings: dict[str, Any], expected: str) -> None:
    assert level(places._clients(ServerConfig(**settings))) == expected


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = dataclasses.replace(ServerConfig(), port=0, data_dir=str(tmp_path / "new" / "data"))
    found = {each.subject: each for each in places.check_places(EngineConfig(), server)}
    assert level(found["data folder"]) == "ok" and "it will be created" in found["data folder"].text
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    assert level(places._folder("f", "--f", tmp_path / "file")) == "stop"
    full = places._folder("f", "--f", tmp_path, 2**60, "--kv-disk-size")
    assert level(full) == "change" and re.search(r"set --kv-disk-size to [\d.]+[GM]iB or less", full.text)
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)
    assert level(places._folder("f", "--f", tmp_path)) == "stop"
    cache = {each.subject: each for each in places.check_places(EngineConfig(), server)}["model cache"]
    assert level(cache) == "change" and "cannot be downloaded" in cache.text


def test_a_shared_store_is_asked() -> None:
    def found(url: str) -> Finding:
        return places._kv_store(EngineConfig(kv_store=url))

    with redis_server("--requirepass", "right") as server:
        address = f"127.0.0.1:{server.port}"
        assert found(f"redis://:right@{address}").text == f"redis://***@{address} answers"
        assert level(found(f"redis://:wrong@{address}")) == "change"
    lost = found(f"redis://:right@{address}")
    assert level(lost) == "change" and "Connection refused" in lost.text and "right" not in lost.text
    assert level(found("no.such:Store")) == "stop"


def test_the_start_of_a_server_says_what_was_decided(folder: Path) -> None:
    from server_process import ServerProcess

    with ServerProcess(folder, "--max-model-len", "64", "--max-batch-size", "3", "--threads", "1") as server:
        for line in ("1 thread (as set)", "6 pages of 32 tokens", "3 of 64 tokens fit", "bfloat16"):
            assert line in server.banner

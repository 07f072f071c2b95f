"""octavo run-batch as a user runs it, killed and continued."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from command_line import OCTAVO, Terminal, complaint, octavo

ROWS = 300


def request(id: int | str, url: str = "/v1/completions", **body: Any) -> str:
    content = {"model": "tiny", "prompt": f"Once {id}", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | body
    return json.dumps({"custom_id": str(id), "method": "POST", "url": url, "body": content})


def command(folder: Path, model: Path) -> list[str]:
    return [
        "run-batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"),
        "--model", str(model), "--served-model-name", "tiny", "--threads", "1", "--max-batch-size", "8",
    ]  # fmt: skip


def lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def texts(folder: Path) -> list[str]:
    return [line["response"]["body"]["choices"][0]["text"] for line in lines(folder)]


def start(folder: Path, model: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*OCTAVO, *command(folder, model)], stderr=subprocess.PIPE, start_new_session=True)


def until_written(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "out.jsonl").exists() or (folder / "out.jsonl").read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with an input and the output of an undisturbed run."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "in.jsonl").write_text("".join(request(id, max_tokens=24) + "\n" for id in range(ROWS)))
    done = octavo(*command(folder, tiny_llama))
    assert done.returncode == 0, done
    return folder


def test_every_line_in_order(whole: Path) -> None:
    assert [line["custom_id"] for line in lines(whole)] == [str(id) for id in range(ROWS)]
    for line in lines(whole):
        assert line["id"].startswith("batch_req_") and line["error"] is None
        assert line["response"]["status_code"] == 200 and line["response"]["request_id"].startswith("req-")
        assert line["response"]["body"]["usage"]["completion_tokens"] == 24


def test_kill_and_continue(whole: Path, tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes((whole / "in.jsonl").read_bytes())
    for count in (1, ROWS // 2):
        process = start(tmp_path, tiny_llama)
        until_written(tmp_path, count)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with (tmp_path / "out.jsonl").open("ab") as file:
            file.write(b'{"id":"batch_req_1","custom_id":"torn')
    kept = (tmp_path / "out.jsonl").read_bytes().rpartition(b"\n")[0]
    done = octavo(*command(tmp_path, tiny_llama))
    assert done.returncode == 0 and "continuing after" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes().startswith(kept)
    assert [line["custom_id"] for line in lines(tmp_path)] == [str(id) for id in range(ROWS)]
    assert texts(tmp_path) == texts(whole)


def test_interrupt(whole: Path, tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes((whole / "in.jsonl").read_bytes())
    process = start(tmp_path, tiny_llama)
    until_written(tmp_path, 1)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert "run the same command again to continue" in stderr.decode() and "Traceback" not in stderr.decode()
    assert 0 < len(lines(tmp_path)) < ROWS


def test_lines_with_errors(tmp_path: Path, tiny_llama: Path) -> None:
    chat = request("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], prompt=None)
    given = {
        request("good"): 200,
        "": None,
        '{"custom_id": "torn", "meth': "invalid_line",
        "not JSON": "invalid_line",
        '{"custom_id": "no url", "body": {}}': "invalid_line",
        request("good", prompt="again"): "duplicate_custom_id",
        request("url", "/v1/other"): "invalid_url",
        request("model", model="other"): 404,
        request("temperature", temperature=-1): 400,
        request("stream", stream=True): "invalid_stream",
        request("method").replace("POST", "GET"): "invalid_method",
        chat.replace('"prompt": null, ', ""): 200,
    }
    (tmp_path / "in.jsonl").write_text("\n".join(given))
    done = octavo(*command(tmp_path, tiny_llama))
    assert done.returncode == 0 and "2 lines answered, 9 failed" in done.stderr
    expected = [value for value in given.values() if value is not None]
    for line, value in zip(lines(tmp_path), expected, strict=True):
        assert (line["response"]["status_code"] if line["response"] else line["error"]["code"]) == value, line
    assert [line["custom_id"] for line in lines(tmp_path)][2:4] == [None, "no url"]
    # All is done already: nothing is loaded and nothing changes.
    before = (tmp_path / "out.jsonl").read_bytes()
    assert octavo(*command(tmp_path, tmp_path / "no model")).returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_files_that_cannot_be_used(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "in.jsonl").write_text(request("a") + "\n")
    (tmp_path / "out.jsonl").write_text("a text of somebody\n")
    assert "not a batch result" in complaint(*command(tmp_path, tiny_llama))
    (tmp_path / "out.jsonl").write_text('{"custom_id": "b", "response": null}\n')
    assert "another input" in complaint(*command(tmp_path, tiny_llama))
    assert (tmp_path / "out.jsonl").read_text().startswith('{"custom_id": "b"')
    assert "cannot read" in complaint("run-batch", "-i", str(tmp_path / "none"), "-o", str(tmp_path / "new"))
    assert "name the input" in complaint("run-batch", "-i", str(tmp_path / "in.jsonl"))
    assert "another file" in complaint("run-batch", str(tmp_path / "in.jsonl"), str(tmp_path / "in.jsonl"))


def test_progress_on_a_terminal(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(request(id, max_tokens=200) + "\n" for id in range(64)))
    terminal = Terminal(*command(tmp_path, tiny_llama))
    terminal.wait_for(r"lines/s, \d+ tokens/s")
    terminal.close()

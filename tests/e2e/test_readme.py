"""The code blocks of README.md: the Python runs as it stands, in order; the commands exist, with their flags."""

import ast
import asyncio
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import octavo
from server_process import ServerProcess

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GIVEN = {  # names that the prose, not the code, introduces
    "AsyncLLM": octavo.AsyncLLM,
    "question": [{"role": "user", "content": "What is a linked list?"}],
    "further_question": [{"role": "user", "content": "And a tree?"}],
}


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found
    return found


def run(source: str, names: dict[str, Any]) -> None:
    code = compile(source, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, dict(names)))  # a program of its own: its `llm` is another one
    else:
        exec(code, names)


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks in one namespace, with short outputs and the address of a server that the test starts."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = dict(GIVEN)
    with ServerProcess("smollm2", "--served-model-name", "smollm2", "--max-model-len", "512") as server:
        for block in blocks("python"):
            source = block.replace("max_tokens=64", "max_tokens=12").replace("http://127.0.0.1:8000", server.url)
            source = source.replace("completions.create(", "completions.create(max_tokens=12, ")
            run(source, names)
    if "llm" in names and hasattr(names["llm"], "close"):
        names["llm"].close()
    assert "Paris" in capsys.readouterr().out


def test_commands() -> None:
    """Every `octavo ...` line names a command whose help lists the flags, every `make ...` line a target."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text()
    for line in lines:
        if line[:1] == ["make"]:
            assert re.search(rf"^{line[1]}:", makefile, re.MULTILINE)
    commands = [line for line in lines if line[:1] == ["octavo"]]
    assert commands
    helps = []
    for command in commands:
        words = command[1:3] if command[1] == "bench" else command[1:2]
        start = [sys.executable, "-c", "from octavo.cli import main; main()", *words, "--help"]
        helps.append(
            subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env={"COLUMNS": "200", "NO_COLOR": "1"})
        )
    for command, process in zip(commands, helps, strict=True):
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, command
        for flag in (word.partition("=")[0] for word in command if word.startswith("--")):
            assert re.search(rf"{flag}\b", text), (command, flag)

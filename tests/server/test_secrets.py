"""A server with an encrypted model and encrypted pages: no secret, and nothing of the model or a chat, is on a disk."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyrage
import pytest
import torch
from safetensors import safe_open

from command_line import octavo
from octavo import LLM, SamplingParams
from octavo.formats.files import MANIFEST
from server_process import ServerProcess
from tiny_models import CHAT_TEMPLATE

IDENTITY = pyrage.x25519.Identity.generate()
KV_KEY = os.urandom(32).hex()
QUESTION = "How do modules, classes and functions differ in what they define, and what is a descriptor? " * 3


@pytest.fixture(scope="module")
def encrypted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as the command encrypts it."""
    folder = tmp_path_factory.mktemp("encrypted") / "model"
    done = octavo("encrypt", tiny_llama, "--recipient", str(IDENTITY.to_public()), "--output", folder)
    assert done.returncode == 0, done.stderr
    assert {file.suffix for file in folder.iterdir()} == {".age"}
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """Flags and variables that name the identity, from the environment, and the key, from a command."""
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "kv").write_text(KV_KEY)
    flags = ["--model-identity", "env:OCTAVO_SECRET_IDENTITY", "--kv-key", f"cmd:cat {keys / 'kv'}"]
    return flags, {"OCTAVO_SECRET_IDENTITY": str(IDENTITY)}


def ask(server: ServerProcess, **more: object) -> dict:
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24} | more
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def known_plaintext(model: Path) -> Iterator[bytes]:
    """Pieces of the model and of the chat that would show that something was written in the clear."""
    with safe_open(model / "model.safetensors", framework="pt") as file:
        for name in list(file.keys())[:3]:
            yield file.get_tensor(name).flatten()[:16].view(torch.uint8).numpy().tobytes()
    yield CHAT_TEMPLATE[:40].encode()
    yield json.dumps(CHAT_TEMPLATE)[1:40].encode()
    yield QUESTION[:40].encode()


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def test_secrets_and_plaintext_stay_in_memory(
    encrypted: Path, tiny_llama: Path, tmp_path: Path, sources: tuple[list[str], dict[str, str]]
) -> None:
    flags, environment = sources
    (temporary := tmp_path / "tmp").mkdir()
    home = tmp_path / "home"
    flags += ["--kv-disk", str(tmp_path / "kv"), "--data-dir", str(tmp_path / "data"), "--access-log", "json"]
    with LLM(str(tiny_llama)) as llm:
        params = SamplingParams(temperature=0, max_tokens=24)
        expected = llm.chat([{"role": "user", "content": QUESTION}], params)[0].outputs[0].text
    variables = {**environment, "TMPDIR": str(temporary), "HOME": str(home)}
    with ServerProcess(encrypted, *flags, **variables) as server:
        first = ask(server, kv_cache_state=True)
        assert first["choices"][0]["message"]["content"] == expected
        os.kill(engine := server.engine_pid(), signal.SIGKILL)
        assert ask(server)["choices"][0]["message"]["content"] == expected, "the next engine has the secrets too"
        assert server.engine_pid(other_than=engine)

        processes = [server.process.pid, *descendants(server.process.pid)]
        assert len(processes) >= 3, "the server, an engine and a process that renders templates"
        for pid in processes:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert str(IDENTITY).encode() not in command and KV_KEY.encode() not in command
        for pid in processes[1:]:
            variables_of = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"PATH" in variables_of
            assert str(IDENTITY).encode() not in variables_of and KV_KEY.encode() not in variables_of
        for pid in (server.process.pid, server.engine_pid()):
            [core] = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file" in line]
            assert core.split()[4:6] == ["0", "0"]
        stats = httpx.get(f"{server.url}/stats").text
    assert server.process.stdout is not None
    printed = server.banner + server.process.stdout.read() + server.stderr() + stats
    files = [file for file in [*tmp_path.rglob("*"), *encrypted.rglob("*")] if file.is_file()]
    assert any(file.suffix == ".page" for file in files)
    secrets = (str(IDENTITY).encode(), KV_KEY.encode(), bytes.fromhex(KV_KEY))
    for known in (*secrets, *known_plaintext(tiny_llama)):
        assert known not in printed.encode()
        for file in files:
            if file.parent.name != "keys":
                assert known not in file.read_bytes(), file


def test_pages_survive_a_restart_and_serve_the_plain_model_too(
    encrypted: Path, tiny_llama: Path, tmp_path: Path, sources: tuple[list[str], dict[str, str]]
) -> None:
    flags, environment = sources
    flags += ["--kv-disk", str(tmp_path / "kv")]
    cached = []
    for model in (encrypted, encrypted, tiny_llama):
        with ServerProcess(model, *flags, **environment) as server:
            cached.append(ask(server)["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0 and cached[1] == cached[2] > 32

    page = next((tmp_path / "kv").rglob("*.page"))
    for file in (tmp_path / "kv").rglob("*.page"):  # all have the content of one of them now
        if file != page:
            shutil.copy(page, file)
    with ServerProcess(encrypted, *flags, **environment) as server:
        changed = ask(server)
    with ServerProcess(tiny_llama) as server:
        assert changed["choices"] == ask(server)["choices"]


@pytest.mark.parametrize("mistake", ["changed", "wrong identity", "no identity"])
def test_a_server_that_must_not_start_says_why_in_one_line(encrypted: Path, tmp_path: Path, mistake: str) -> None:
    copy = shutil.copytree(encrypted, tmp_path / "copy")
    weights = copy / "model.safetensors.age"
    (tmp_path / "id").write_text(str(pyrage.x25519.Identity.generate() if mistake == "wrong identity" else IDENTITY))
    if mistake == "changed":
        content = bytearray(weights.read_bytes())
        content[len(content) * 3 // 4] ^= 1
        weights.write_bytes(content)
    flags = [] if mistake == "no identity" else ["--model-identity", tmp_path / "id"]
    done = octavo("serve", copy, "--port", "0", *flags)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("octavo: "), done.stderr
    expected = {"no identity": "--model-identity", "wrong identity": "cannot be opened with this identity"}
    assert expected.get(mistake, "was changed, cut or replaced") in done.stderr
    assert str(copy) in done.stderr


def test_encrypt_says_what_is_wrong(encrypted: Path, tiny_llama: Path, tmp_path: Path) -> None:
    to = ("--recipient", str(IDENTITY.to_public()))
    for arguments, message in (
        ((tiny_llama, "--recipient", "age1x"), "is no recipient"),
        ((encrypted, *to, "--output", tmp_path / "again"), "is encrypted already"),
        ((tiny_llama, *to, "--output", tmp_path), "exists"),
    ):
        done = octavo("encrypt", *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "again").exists() and not (tmp_path / MANIFEST).exists()

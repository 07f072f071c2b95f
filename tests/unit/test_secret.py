"""Where secrets come from, and what is said if they do not."""

from pathlib import Path

import pytest

from octavo import LLM
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.secret import Secrets, read_key, read_secret, without_secrets
from octavo.server.config import ServerConfig

KEY = "0123456789abcdef" * 4


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(f" {KEY}\n")
    monkeypatch.setenv("OCTAVO_SECRET_KEY", KEY)
    path = str(tmp_path / "key")
    for source in (path, f"file:{path}", "env:OCTAVO_SECRET_KEY", f"cmd:cat '{path}'"):
        assert read_key("kv_key", source) == KEY
    assert read_key("kv_key", None) is None
    assert EngineConfig.from_keywords(kv_key=path).read_secrets() == Secrets(None, KEY)


def test_mistakes_are_one_line_that_does_not_show_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short").write_text("hunter2")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "long").write_bytes(b"x" * 70_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("OTHER", "hunter2")
    for source, message in {
        str(tmp_path / "short"): "must be 64 hexadecimal digits",
        str(tmp_path / "empty"): "holds nothing",
        str(tmp_path / "long"): "at most 64 KiB",
        str(tmp_path / "binary"): "is not text",
        str(tmp_path / "none"): "No such file",
        str(tmp_path): "directory",
        "env:OTHER": "must be called OCTAVO_SECRET_",
        "env:OCTAVO_SECRET_NONE": "has no variable",
        "cmd:no-such-program": "cannot run",
        "cmd:sh -c 'echo hunter2; exit 3'": "exit code 3",
        "cmd:": "cannot run",
        "cmd:'": "cannot run",
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            read_key("kv_key", source)
        assert str(error.value).startswith("kv_key") and "\n" not in str(error.value)
        assert "hunter2" not in str(error.value) or source.startswith("cmd:sh"), "only the command is shown"


@pytest.mark.parametrize(
    "secret", [KEY, KEY.upper(), KEY[:-1], f" {KEY}\n", "AGE-SECRET-KEY-1QQPZRY9X8GF2TVDW0S3JN54KHCE6"]
)
@pytest.mark.parametrize("kind", ["", "file:", "env:", "env:OCTAVO_SECRET_"])
def test_a_secret_in_place_of_its_source_is_not_shown(kind: str, secret: str) -> None:
    with pytest.raises(ConfigError, match="kv_key seems to be the secret itself") as error:
        read_key("kv_key", kind + secret)
    assert secret.strip()[16:24] not in str(error.value) and "\n" not in str(error.value)


def test_children_do_not_inherit_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_SECRET_A", "hunter2")
    monkeypatch.setenv("OCTAVO_PORT_A", "x")
    assert "OCTAVO_SECRET_A" not in without_secrets() and "OCTAVO_PORT_A" in without_secrets()
    assert read_secret("kv_key", "cmd:sh -c 'env | grep -c hunter2 || true'") == "0"


def test_secrets_are_not_printed() -> None:
    secrets = Secrets("AGE-SECRET-KEY-1", KEY)
    assert "AGE" not in f"{secrets} {secrets!r}" and KEY not in repr(secrets)
    assert secrets and not Secrets()


def test_an_audit_log_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="audit_key must be given with audit_log"):
        ServerConfig(audit_log="x")


def test_python_needs_the_identity_too(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_key: cannot read"):
        LLM(str(tiny_llama), kv_key=str(tmp_path / "none"))

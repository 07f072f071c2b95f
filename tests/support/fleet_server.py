"""A real server of several models, and loads that a test can hold up."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx

from server_process import ServerProcess

KEY = "key-of-the-admin"
ADMIN = {"Authorization": f"Bearer {KEY}"}
# What Python runs first in every process: each load of a model waits while a file named `hold` exists.
SLOW_LOADS = """
import time, pathlib, octavo.engine.loading as loading
load, folder = loading.load_engine, pathlib.Path(__file__).parent
def slow(*arguments, **options):
    (folder / "begun").touch()
    while (folder / "hold").exists():
        time.sleep(0.005)
    return load(*arguments, **options)
loading.load_engine = slow
"""


class FleetServer(ServerProcess):
    """Serves the models of a models file, with an admin key. `folder` keeps the file."""

    def __init__(self, folder: Path, description: Mapping[str, Any], *flags: str, **environment: str):
        self._folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "models.yaml").write_text(json.dumps(description))
        (folder / "sitecustomize.py").write_text(SLOW_LOADS)
        super().__init__(
            None, "--models", str(folder / "models.yaml"), "--access-log", "none", *flags,
            OCTAVO_ADMIN_KEY=KEY, PYTHONPATH=str(folder), **environment,
        )  # fmt: skip

    def __enter__(self) -> Self:
        super().__enter__()
        self.http = httpx.Client(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.let_load()
        self.http.close()
        super().__exit__(kind, *rest)

    def hold_loads(self) -> None:
        """Make loads that begin from now on wait."""
        (self._folder / "begun").unlink(missing_ok=True)
        (self._folder / "hold").touch()

    def until_loading(self) -> None:
        """Wait until a load has begun to wait."""
        until(lambda: (self._folder / "begun").exists())

    def let_load(self) -> None:
        (self._folder / "hold").unlink(missing_ok=True)

    def change(self, action: str, name: str, **more: Any) -> httpx.Response:
        body = {"action": action, "name": name, **more}
        return self.http.post("/v1/admin/models", json=body, headers=ADMIN)

    def models(self) -> dict[str, Any]:
        """The entries of /v1/models by name."""
        return {entry["id"]: entry for entry in self.http.get("/v1/models").json()["data"]}

    def state(self, model: str) -> str:
        return str(self.models()[model]["state"])

    def until_state(self, model: str, state: str) -> None:
        until(lambda: self.state(model) == state)

    def complete(self, model: str | None = None, prompt: Any = "Once", **options: Any) -> httpx.Response:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True} | options
        if model is not None:
            body["model"] = model
        return self.http.post("/v1/completions", json=body)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])

"""Every test here of an engine in the tests' process runs twice: the second time, the engine's backend is late."""

from pathlib import Path

import pytest

from late_backend import late_engines
from octavo.engine.recovery import Recovery

# Files that run an engine in the tests' process, and whether they are part of the sample that always runs late too.
LATE = {
    "test_beam_search.py": False,
    "test_determinism.py": False,
    "test_embeddings.py": False,
    "test_forged_states.py": False,
    "test_generate_iter.py": False,
    "test_kv_restart.py": False,
    "test_kv_state_files.py": False,
    "test_kv_states.py": False,
    "test_kv_store_redis.py": False,
    "test_kv_traffic.py": True,
    "test_llm.py": False,
    "test_masks.py": False,
    "test_policies.py": False,
    "test_prompt_logprobs.py": True,
    "test_python_api.py": False,
    "test_sampling_limits.py": True,
    "test_sampling_options.py": False,
    "test_scores.py": False,
    "test_speculation.py": False,
    "test_structured_output.py": False,
    "test_timeouts.py": False,
}


class LateModule(pytest.Module):
    """A test file again, with late engines."""

    def setup(self) -> None:
        engines = late_engines()
        engines.__enter__()
        self.addfinalizer(lambda: engines.__exit__(None, None, None))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name not in LATE:
        return None
    name = f"{file_path.name}[late]"
    module = LateModule.from_parent(parent, path=file_path, name=name, nodeid=f"{parent.nodeid}/{name}")
    if not LATE[file_path.name]:
        module.add_marker("exhaustive")
    return module


@pytest.fixture
def always_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines in this process fetch all pages that are saved: a tiny model may compute faster than it reads."""
    monkeypatch.setattr(Recovery, "should_fetch", lambda *_: True)

"""Fixtures of the tests of the page: a browser, and a fleet of which one model is loaded."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, chromium
from fleet_server import FleetServer


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chrome: Browser) -> Iterator[Browser]:
    """The browser, which must show no error in its console."""
    chrome.allowed = ()
    chrome.console()
    chrome.size(1280, 860)
    yield chrome
    assert chrome.console() == []


@pytest.fixture(scope="module")
def fleet(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetServer]:
    models = {
        "tiny": {"model": str(tiny_llama), "aliases": ["nick"], "kv_cache_memory": "4MiB"},
        "later": {"model": str(tiny_llama), "load_on_demand": True},
    }
    description = {"models": models, "splits": {"both": {"tiny": 90, "later": 10}}}
    with FleetServer(tmp_path_factory.mktemp("fleet"), description) as server:
        yield server

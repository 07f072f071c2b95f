"""`octavo engine` hears Ctrl-C and SIGTERM also before it serves, whatever it waits for."""

import signal
from pathlib import Path

import pytest

from engine_process import RemoteEngine
from hub_mirror import Stall, hub_mirror


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_the_model_is_downloaded(tiny_llama: Path, tmp_path: Path, number: signal.Signals) -> None:
    """From a mirror that hangs in the midst of it."""
    stall = Stall()
    with hub_mirror({"octavo/tiny": tiny_llama}, stall) as url:
        engine = RemoteEngine(Path("octavo/tiny"), HF_ENDPOINT=url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
        with engine:
            assert stall.begun.wait(30)
            engine.process.send_signal(number)
            engine.process.wait(timeout=3)

"""What engines ask Ray for."""

import pytest

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'octavo[ray]'")

from octavo.config import EngineConfig
from octavo.ray import app
from octavo.ray.resources import engine_options


def test_an_engine_asks_for_its_processors_or_gpus() -> None:
    assert engine_options(EngineConfig(model="m", threads=3)) == {"num_cpus": 3}
    assert engine_options(EngineConfig(model="m", device="cuda", tensor_parallel_size=4)) == {
        "num_cpus": 1,
        "num_gpus": 4,
    }


def test_the_settings_of_an_application_win() -> None:
    settings = {"model": "m", "device": "cuda", "served_model_name": "tiny"}
    for actor, gpus in ((None, 1), ({"num_gpus": 0.5}, 0.5)):
        [engines] = app(settings, engine_actor=actor)._bound_deployment.init_kwargs.values()
        assert engines._bound_deployment.ray_actor_options["num_gpus"] == gpus

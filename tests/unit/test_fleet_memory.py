"""What a model needs of a fleet's memory on each device."""

import dataclasses
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.fleet.memory import ENGINE, needs
from octavo.model import describe_model
from octavo.weights import open_checkpoint

KV = 2**20


@pytest.mark.parametrize("quantization, each", [("none", 2), ("8bit", 1)])
def test_a_gpu_holds_weights_in_the_chosen_format(quantization: str, each: int, tiny_model: Any) -> None:
    path = tiny_model("llama-256")
    config = EngineConfig(device="cuda", quantization=quantization, kv_cache_memory=KV)
    checkpoint = open_checkpoint(path)
    _, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    weights = 0
    for name, parameter in parameters.items():
        rows, columns = (*parameter.shape, 0)[:2]
        spans = 8 if name.endswith((".out", ".down")) else 1  # at most
        scales = 4 * rows * spans if each == 1 else 0
        weights += each * rows * columns + scales if columns and name != "embed" else 2 * rows * max(columns, 1)
    if "head" not in parameters and each == 1:  # the embedding is looked up in bfloat16 and multiplied in integers
        rows, columns = parameters["embed"].shape
        weights += rows * columns + 4 * rows
    assert needs(config, path).bytes == weights + weights // 50 + KV + ENGINE["cuda"]


def test_only_a_cpu_rounds_to_4_bits_when_it_loads(tiny_model: Any) -> None:
    config = EngineConfig(device="cpu", quantization="4bit", kv_cache_memory=1)
    path = tiny_model("llama-256")
    largest = 256 * 512  # gate_up
    rounding = needs(config, path).bytes - needs(dataclasses.replace(config, kv_cache_memory=10**9), path).bytes + 10**9
    assert rounding == 5 * largest
    on_gpu = dataclasses.replace(config, device="cuda")
    assert needs(dataclasses.replace(on_gpu, kv_cache_memory=2), path).bytes == needs(on_gpu, path).bytes + 1

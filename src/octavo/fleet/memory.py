"""The memory that the models of a fleet take, and a budget for it."""

import dataclasses
import math
from collections.abc import Hashable, Iterable

from octavo.config import EngineConfig
from octavo.errors import OutOfMemory
from octavo.formats.files import ModelPath
from octavo.model import describe_model
from octavo.weights import open_checkpoint

MEBI = 2**20
SERVER = 256 * MEBI  # this process and the processes that render chat templates
ENGINE = {"cpu": 128 * MEBI, "torch": 640 * MEBI, "cuda": 1024 * MEBI}  # a process without weights and KV cache
LEAST_KV = 64 * MEBI
SCRATCH_PER_WEIGHT = 5  # bytes for each weight of the largest tensor, while a CPU rounds it to 4 bits
NEVER_4BIT = ("embed", "head")  # parameters that take 8 bits at least
BYTES_PER_WEIGHT = {"none": 2.0, "auto": 2.0, "8bit": 1.02, "4bit": 0.76}  # on a CPU


@dataclasses.dataclass(frozen=True)
class Needs:
    """An upper bound of the bytes that a model's engines take, and its settings, with a bounded KV cache."""

    bytes: int
    config: EngineConfig


def needs(config: EngineConfig, path: ModelPath) -> Needs:
    """Return what the model at `path` needs. Reads only the headers of its files.

    Without kv_cache_memory, each engine's KV cache may take as much as its weights, but at least LEAST_KV and at most
    what a full batch needs.

    Raises:
        ModelNotFound, DamagedWeights, UnsupportedModel
    """
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    sizes = [(math.prod(part.shape), part.nbytes) for each in parameters.values() for part in each.parts]
    if config.backend_name == "cuda":
        from octavo.backends.cuda.weight_bytes import bytes_of_weights

        weights = bytes_of_weights(parameters, config.quantization)
    elif config.backend_name == "torch":
        weights = sum(values * (4 if config.dtype in ("float32", "fp32") else 2) for values, _ in sizes)
    else:
        per_weight = BYTES_PER_WEIGHT[config.quantization]
        stored_is_kept = config.quantization == "auto"
        weights = sum(int(min(values * per_weight, stored if stored_is_kept else math.inf)) for values, stored in sizes)
    kv = config.kv_cache_memory
    if kv is None:
        length = min(config.max_model_len or spec.max_positions, spec.max_positions)
        pages = config.max_batch_size * -(-length // config.kv_cache_page_size)
        token_bytes = spec.num_layers * spec.kv_size * 2 * (4 if config.dtype in ("float32", "fp32") else 2)
        kv = min(pages * config.kv_cache_page_size * token_bytes, max(weights, LEAST_KV))
    # The KV cache is first used after the load, when the memory for quantizing is free again.
    largest = max(
        sum(math.prod(part.shape) for part in parameters[name].parts) for name in parameters if name not in NEVER_4BIT
    )
    rounds = config.backend_name == "cpu" and config.quantization == "4bit"
    scratch = SCRATCH_PER_WEIGHT * largest if rounds else 0
    processes = config.tensor_parallel_size * ENGINE[config.backend_name]
    engine = weights + weights // 50 + max(kv, scratch) + (config.kv_host_memory or 0) + processes
    return Needs(engine * config.data_parallel_size, dataclasses.replace(config, kv_cache_memory=kv))


class Budget:
    """Bytes that are reserved by models, up to a total. `SERVER` bytes of the total are kept for the server."""

    def __init__(self, total: int):
        self.total = total
        self._reserved: dict[Hashable, int] = {}

    @property
    def used(self) -> int:
        return SERVER + sum(self._reserved.values())

    def reserved(self, owners: Iterable[Hashable]) -> int:
        """Return the bytes that `owners` have reserved."""
        return sum(self._reserved.get(owner, 0) for owner in owners)

    def fits(self, size: int) -> bool:
        """Return whether `size` more bytes may be reserved now."""
        return self.used + size <= self.total

    def reserve(self, owner: Hashable, size: int) -> None:
        self._reserved[owner] = size

    def release(self, owner: Hashable) -> None:
        self._reserved.pop(owner, None)

    def check(self, name: str, size: int) -> None:
        """Raise OutOfMemory if a model would not even fit alone."""
        if SERVER + size > self.total:
            raise OutOfMemory(
                f"the model {name!r} needs {size / 2**30:.2f} GiB, and the memory budget of {self.total / 2**30:.2f} "
                f"GiB leaves {max(self.total - SERVER, 0) / 2**30:.2f} GiB for models: raise --memory, or lower the "
                "model's kv_cache_memory"
            )

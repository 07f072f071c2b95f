"""From an EngineConfig to an engine that is ready to step."""

import importlib
import importlib.util
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.backends.base import Backend, BackendFactory, Progress
from octavo.config import DTYPES, KV_CACHE_DTYPES, EngineConfig, parse_size
from octavo.errors import ConfigError, OutOfMemory
from octavo.kv import Transfers
from octavo.kv.tiers.disk import DiskTier
from octavo.kv.tiers.host import HostTier
from octavo.kv.tiers.tier import Tier
from octavo.machine import available_memory
from octavo.model import describe_model
from octavo.version import __version__
from octavo.weights import Checkpoint, fingerprint, open_checkpoint

from .engine import Engine
from .policies import Deadline, Fair, Policy, Priority
from .self_test import self_test
from .speculation import FREE_ROWS

if TYPE_CHECKING:
    from octavo.model.spec import DecoderSpec


def load_engine(config: EngineConfig, path: Path, progress: Progress | None = None) -> Engine:
    """Open the checkpoint at `path`, compile the model on its backend, allocate the KV pool.

    Raises DamagedWeights, UnsupportedModel, ConfigError, OutOfMemory.
    """
    policy = load_policy(config)  # first, for a mistake in it is known at once
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    if config.max_model_len and config.max_model_len > spec.max_positions:
        raise ConfigError(f"max_model_len is {config.max_model_len}, but the model ends at {spec.max_positions} tokens")
    max_model_len = config.max_model_len or spec.max_positions
    backend = _backend_factory(config)(
        spec,
        parameters,
        page_size=config.kv_cache_page_size,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_size=max(config.max_batch_size, FREE_ROWS),  # guesses are sampled too
        max_model_len=max_model_len,
        threads=config.num_threads,
        dtype=DTYPES[config.dtype],
        quantization=config.quantization,
        kv_cache_dtype=KV_CACHE_DTYPES[config.kv_cache_dtype],
        device=config.device,
        progress=progress or _silent,
    )
    num_pages = _num_pages(config, spec, backend.page_bytes, max_model_len)
    backend.allocate_kv(num_pages)
    self_test(backend, config.max_batch_tokens)
    return assemble(
        config,
        backend,
        num_pages=num_pages,
        max_model_len=max_model_len,
        policy=policy,
        fingerprint=_page_fingerprint(checkpoint, backend),
    )


def assemble(
    config: EngineConfig,
    backend: Backend,
    *,
    num_pages: int,
    max_model_len: int,
    policy: Policy | None = None,
    fingerprint: str = "",
    transfers: Transfers | None = None,
    clock: Callable[[], float] = time.time,
) -> Engine:
    """An engine as `config` has it, on a backend whose pool of `num_pages` is allocated. Raises ConfigError.

    `transfers`: to other tiers than those that `config` names.
    """
    return Engine(
        backend,
        num_pages=num_pages,
        max_model_len=max_model_len,
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
        policy=policy or load_policy(config),
        prefix_caching=config.enable_prefix_caching,
        fingerprint=fingerprint,
        transfers=(transfers or _transfers(config, backend)) if config.enable_prefix_caching else None,
        preemption=config.preemption,
        speculative_tokens=config.speculative_tokens,
        request_timeout=config.request_timeout,
        clock=clock,
    )


def _transfers(config: EngineConfig, backend: Backend) -> Transfers:
    """To the tiers that `config` names. Raises ConfigError for a folder that cannot be had."""
    tiers: list[Tier] = []
    if config.kv_host_memory is not None:
        tiers.append(HostTier(parse_size(config.kv_host_memory, "kv_host_memory")))
    if config.kv_disk is not None:
        size = parse_size(config.kv_disk_size, "kv_disk_size")
        tiers.append(DiskTier(Path(config.kv_disk), size, backend.page_bytes))
    return Transfers(backend, tiers)


def load_policy(config: EngineConfig) -> Policy:
    """The policy that `scheduling_policy` names. Raises ConfigError."""
    ours: dict[str, type[Policy]] = {"fcfs": Policy, "priority": Priority, "deadline": Deadline, "fair": Fair}
    name = config.scheduling_policy
    policy = ours.get(name) or _import_policy(name)
    try:
        return policy(config)
    except Exception as error:  # a user's constructor may raise anything
        raise ConfigError(f"scheduling_policy {name} does not start: {type(error).__name__}: {error}") from error


def _import_policy(name: str) -> type[Policy]:
    """The class that package.module:ClassName names."""
    module_name, class_name = name.split(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        hint = "; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        cause = f"{type(error).__name__}: {error}{hint}"
        raise ConfigError(f"scheduling_policy {name}: cannot import {module_name}: {cause}") from error
    policy = getattr(module, class_name, None)
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        what = f"has no {class_name}" if policy is None else f"has {class_name}, which is not a subclass of Policy"
        raise ConfigError(f"scheduling_policy {name}: {module_name} {what} (octavo.engine.policies.Policy)")
    return policy


def _backend_factory(config: EngineConfig) -> BackendFactory:
    if config.backend == "torch":
        if importlib.util.find_spec("torch") is None:
            raise ConfigError("the torch backend needs PyTorch: pip install 'octavo[torch]'")
        from octavo.backends.torch import load as load_torch

        return load_torch
    from octavo.backends.cpu import load as load_cpu

    return load_cpu


def _page_fingerprint(checkpoint: Checkpoint, backend: Backend) -> str:
    """Names all that decides the bits of a page of given tokens: an engine with another one must not use ours."""
    parts = (__version__, fingerprint(checkpoint), backend.arithmetic, backend.page_size)
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _num_pages(config: EngineConfig, spec: "DecoderSpec", page_bytes: int, max_model_len: int) -> int:
    """Pages of the KV pool: as asked for, else for a full batch of long sequences, within half the free memory."""
    page_size = config.kv_cache_page_size
    pages_per_sequence = -(-max_model_len // page_size)
    if config.kv_cache_memory is None:
        num_pages = min(config.max_batch_size * pages_per_sequence, available_memory() // 2 // page_bytes)
    else:
        num_pages = parse_size(config.kv_cache_memory, "kv_cache_memory") // page_bytes
    needed = pages_per_sequence if config.max_model_len else 1  # an explicit length is a promise
    if num_pages < needed:
        raise OutOfMemory(
            f"the KV cache has room for {num_pages * page_size} tokens, less than {needed * page_size}: "
            f"set kv_cache_memory to at least {needed * page_bytes / 2**20:.0f}MiB, or a smaller max_model_len"
        )
    return num_pages


def _silent(done: int, total: int) -> None:
    pass

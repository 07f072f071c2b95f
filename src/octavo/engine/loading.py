"""Load an engine according to an EngineConfig.

`load_engine` opens the checkpoint and loads the backend; `assemble` makes the engine around a backend; `plan_engine`
returns what `load_engine` would decide.
"""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from octavo.backends.base import Backend, BackendFactory, Footprint, Progress
from octavo.config import DTYPES, KV_CACHE_DTYPES, EngineConfig
from octavo.errors import ConfigError, OutOfMemory
from octavo.formats.files import ModelPath, unlock
from octavo.kv import Transfers
from octavo.kv.tiers.disk import DiskTier
from octavo.kv.tiers.host import HostTier
from octavo.kv.tiers.tier import Tier
from octavo.machine import available_cores, available_memory
from octavo.model import describe_model
from octavo.model.shard import check_size, divides_heads
from octavo.secret import Secrets
from octavo.states.file import page_cipher
from octavo.tracing.engine import EngineTrace
from octavo.version import __version__
from octavo.weights import Checkpoint, fingerprint, open_checkpoint

from .constraints import Constraints
from .engine import Engine
from .engine_plan import EnginePlan, make_plan, size
from .policies import Policy
from .policies.loading import load_policy
from .self_test import self_test
from .speculation import FREE_ROWS
from .work_record import WorkRecord

if TYPE_CHECKING:
    from octavo.formats.page_cipher import PageCipher
    from octavo.kv.peers.access import PeerAccess
    from octavo.kv.store.sharing import Sharing
    from octavo.kv.store.store import Store
    from octavo.model.spec import DecoderSpec
    from octavo.text.grammars import Grammars


def load_engine(
    config: EngineConfig,
    path: Path,
    progress: Progress | None = None,
    work: WorkRecord | None = None,
    engines: int = 1,
    secrets: Secrets | None = None,
    on_rank_end: Callable[[int, str], None] | None = None,
    access: "PeerAccess | None" = None,
    number: int = 0,
) -> Engine:
    """Open the checkpoint at `path`, compile the model on the configured backend and allocate the KV pool.

    Args:
        progress: called while weights are read, progress(done bytes, total bytes).
        work: see Engine.
        engines: number of engines that load at the same time and divide the free memory among them.
        secrets: what opens an encrypted model and encrypts pages on disk; by default, it is read as `config` says.
        on_rank_end: called, in another thread, when one of the processes over which the model is divided has ended by
            itself: its exit code, and a line about it. The engine's steps fail then.
        access: for pages from engine to engine, if there are several.
        number: that of this engine among `engines`, from 0.

    Raises:
        ConfigError, DamagedWeights, UnsupportedModel, OutOfMemory
    """
    config, sharing = _placed(config, number, engines)
    policy = load_policy(config)  # first, so that a mistake in it is reported before weights are read
    store = _store(config)
    secrets = config.read_secrets() if secrets is None else secrets
    cipher = page_cipher(secrets.kv_key)
    files = unlock(path, secrets.model_identity)
    checkpoint = open_checkpoint(files)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    max_model_len = _max_model_len(config, spec)
    settings, load_backend = _backend_settings(config, max_model_len), _backend(config)[0]
    if config.tensor_parallel_size > 1:
        load_backend = _load_ranks(config, path, secrets, on_rank_end, checkpoint)
    backend = load_backend(spec, parameters, **settings, progress=progress or _silent)
    try:
        checkpoint.verify()
        plan = make_plan(
            config,
            backend.footprint,
            max_model_len,
            settings["threads"],
            *_kv_share(config, sharing, backend.footprint, backend),
            whole_attention=not divides_heads(spec, config.tensor_parallel_size),
        )
        backend.allocate_kv(plan.num_pages)
        slowest = self_test(backend, config.max_batch_tokens)
    except BaseException:
        backend.close()
        raise
    trace = EngineTrace(_sampling_clock(backend)) if config.trace is not None else None
    engine = assemble(
        config,
        backend,
        num_pages=plan.num_pages,
        max_model_len=max_model_len,
        policy=policy,
        fingerprint=_page_fingerprint(checkpoint, backend),
        work=work,
        constraints=Constraints(partial(_load_grammars, files)),
        trace=trace,
        cipher=cipher,
        store=store,
        access=access,
    )
    engine.slowest_step, engine.plan, engine.role = slowest, plan, config.role
    return engine


def plan_engine(config: EngineConfig, path: ModelPath) -> EnginePlan:
    """Return what each of the model's engines would decide if it were loaded now. Reads no weights.

    Raises:
        ConfigError, DamagedWeights, UnsupportedModel, OutOfMemory
    """
    load_policy(config)
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    max_model_len, ranks = _max_model_len(config, spec), config.tensor_parallel_size
    check_size(spec, ranks)
    threads = config.threads or max(1, available_cores() // config.data_parallel_size // config.ranks_here)
    config, engines = _placed(config, 0, config.data_parallel_size)
    _, backend_footprint = _backend(config)
    footprint = backend_footprint(spec, parameters, **_backend_settings(config, max_model_len))
    share = _kv_share(config, engines, footprint)
    if share[0] < 0:
        raise OutOfMemory(
            f"the weights{f' of {engines} engines' if engines > 1 else ''} need "
            f"{size(engines * footprint.weight_bytes)} and {size(_free_memory(config))} are free; use a smaller model"
            f"{_fewer_bits(config)}{', or fewer engines' if engines > 1 else ''}"
        )
    return make_plan(config, footprint, max_model_len, threads, *share, whole_attention=not divides_heads(spec, ranks))


def _free_memory(config: EngineConfig) -> int:
    """Return the free bytes where the model's weights and KV pool go."""
    if config.backend_name != "cuda":
        return available_memory()
    from octavo.backends.cuda.memory import memory_of_setting

    return memory_of_setting(config.device).free


def _fewer_bits(config: EngineConfig) -> str:
    """Return the advice to quantize the weights, unless the backend or the setting has no fewer bits."""
    fewest = {"cpu": "4bit", "cuda": "8bit"}.get(config.backend_name, config.quantization)
    return "" if config.quantization == fewest else f", or quantization {fewest}"


def _placed(config: EngineConfig, number: int, engines: int) -> tuple[EngineConfig, int]:
    """Return the settings with the device of an engine, and how many engines share that device."""
    if config.backend_name != "cuda" or config.engines is not None:
        return config, engines
    _backend(config)  # says what is missing
    from octavo.backends.cuda.device import place_engine

    device, sharing = place_engine(config.device, config.tensor_parallel_size, number, engines)
    return config.replaced("device", device), sharing


def _kv_share(
    config: EngineConfig, engines: int, footprint: Footprint, loaded: Backend | None = None
) -> tuple[int, str]:
    """Return the bytes that the KV pool of one of `engines` may take, and which part of the memory that is.

    Args:
        engines: those that share the memory.
        footprint: of each engine.
        loaded: the backend, once its weights are in memory.

    Raises OutOfMemory if a GPU has none left.
    """
    if config.backend_name == "cuda" and config.kv_cache_memory is None:
        from octavo.backends.cuda.memory import OnDevice, kv_bytes, memory_of_setting

        share, tokens = config.gpu_memory_utilization, config.max_batch_tokens
        memory = memory_of_setting(config.device) if loaded is None else cast(OnDevice, loaded).memory
        most = kv_bytes(memory, share, engines, footprint, tokens, loaded is not None)
        return most, f"what weights and steps leave of gpu_memory_utilization, {share:.0%}"
    free = _free_memory(config) - (0 if loaded is not None else engines * footprint.weight_bytes)
    return free // 2 // engines, "half of the free memory"


def assemble(
    config: EngineConfig,
    backend: Backend,
    *,
    num_pages: int,
    max_model_len: int,
    policy: Policy | None = None,
    fingerprint: str = "",
    transfers: Transfers | None = None,
    work: WorkRecord | None = None,
    clock: Callable[[], float] = time.monotonic,
    constraints: Constraints | None = None,
    trace: EngineTrace | None = None,
    cipher: "PageCipher | None" = None,
    store: "Store | None" = None,
    access: "PeerAccess | None" = None,
) -> Engine:
    """Return an engine with the settings of `config`, on a backend whose pool of `num_pages` pages is allocated.

    Args:
        policy: replaces the policy that `config` names.
        fingerprint, work, clock, constraints, trace, cipher: see Engine.
        transfers: replaces the transfers to the tiers that `config` names.
        store: where pages are shared with other engines, if prefixes are cached.
        access: for pages from engine to engine; see `Engine.serve_pages`.

    Raises:
        ConfigError: the policy, the folder of kv_disk or the URL of kv_store cannot be used.
    """
    sharing = open_sharing = None
    if not config.enable_prefix_caching:
        transfers = None
    else:
        transfers = transfers or _transfers(config, backend, trace, cipher)
        open_sharing = partial(_sharing, store, config.kv_store_ttl, backend, fingerprint, transfers, cipher, access)
        sharing = None if store is None else open_sharing()
    return Engine(
        backend,
        num_pages=num_pages,
        max_model_len=max_model_len,
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
        policy=policy or load_policy(config),
        prefix_caching=config.enable_prefix_caching,
        fingerprint=fingerprint,
        transfers=transfers,
        preemption=config.preemption,
        speculative_tokens=config.speculative_tokens,
        request_timeout=config.request_timeout,
        work=work,
        clock=clock,
        constraints=constraints,
        trace=trace,
        cipher=cipher,
        sharing=sharing,
        open_sharing=None if access is None else open_sharing,
    )


def _sampling_clock(backend: Backend) -> Callable[[], float] | None:
    """Return the function that returns the seconds that a backend has spent on sampling; None if it has none."""
    return getattr(backend, "sampling_seconds", None)


def _load_grammars(path: ModelPath) -> "Grammars":
    # Imported with the first grammar, so that other engines start sooner.
    from octavo.text import Tokenizer
    from octavo.text.grammars import MAX_SECONDS, Grammars

    # The frontend has compiled the grammar within its limit; a slower moment must not fail the request.
    return Grammars(Tokenizer.load(path), max_seconds=4 * MAX_SECONDS)


def _transfers(
    config: EngineConfig, backend: Backend, trace: EngineTrace | None, cipher: "PageCipher | None"
) -> Transfers:
    """Return transfers to the tiers that `config` names. Raises ConfigError."""
    tiers: list[Tier] = []
    if config.kv_host_memory is not None:
        tiers.append(HostTier(config.kv_host_memory))
    if config.kv_disk is not None:
        tiers.append(_disk_tier(Path(config.kv_disk), config.kv_disk_size, backend.page_bytes, cipher))
    return Transfers(backend, tiers, trace=trace)


def _store(config: EngineConfig) -> "Store | None":
    """Return the store that `config` names, to which nothing is connected yet. Raises ConfigError."""
    if config.kv_store is None:
        return None
    from octavo.kv.store.loading import load_store

    return load_store(config)


def _sharing(
    store: "Store | None",
    ttl: float,
    backend: Backend,
    fingerprint: str,
    transfers: Transfers,
    cipher: "PageCipher | None",
    access: "PeerAccess | None",
) -> "Sharing":
    """Return what shares pages with other engines. It starts threads."""
    from octavo.kv.store.sharing import Sharing  # imported late, as most engines share no pages

    return Sharing(
        store, backend, fingerprint=fingerprint, ttl=ttl, cipher=cipher, access=access, on_change=transfers.wake
    )


def _disk_tier(folder: Path, capacity: int, page_bytes: int, cipher: "PageCipher | None") -> Tier:
    """Return the tier on disk, encrypted if there is a cipher. Raises ConfigError."""
    if cipher is None:
        return DiskTier(folder, capacity, page_bytes)
    from octavo.formats.page_cipher import OVERHEAD
    from octavo.kv.tiers.encrypted import EncryptedTier

    return EncryptedTier(DiskTier(folder, capacity, page_bytes + OVERHEAD), cipher)


def _max_model_len(config: EngineConfig, spec: "DecoderSpec") -> int:
    """Return the tokens of the longest sequence. Raises ConfigError if the setting exceeds the model's."""
    if config.max_model_len and config.max_model_len > spec.max_positions:
        raise ConfigError(f"max_model_len must be at most the model's {spec.max_positions}, not {config.max_model_len}")
    return config.max_model_len or spec.max_positions


def _backend(config: EngineConfig) -> tuple[BackendFactory, Callable[..., Footprint]]:
    """Return the functions of the configured backend that load a model, and that return its footprint."""
    name = config.backend_name
    for module in {"torch": ("torch",), "cuda": ("torch", "triton")}.get(name, ()):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"the {name} backend needs {module}: pip install 'octavo[{name}]'")
    if name == "cuda":
        from octavo.backends.cuda import backend as cuda

        return cuda.load, partial(cuda.footprint, ranks=config.tensor_parallel_size)
    if name == "torch":
        from octavo.backends import torch

        return torch.load, torch.footprint
    from octavo.backends import cpu

    return cpu.load, partial(cpu.footprint, ranks=config.tensor_parallel_size, nodes=config.nnodes)


def _load_ranks(
    config: EngineConfig,
    path: Path,
    secrets: Secrets,
    on_end: Callable[[int, str], None] | None,
    checkpoint: Checkpoint,
) -> BackendFactory:
    """Return the function that loads a model into several processes. Raises ConfigError."""
    common: dict[str, Any] = {
        "size": config.tensor_parallel_size,
        "path": path,
        "identity": secrets.model_identity,
        "hide": bool(secrets),
        "on_end": on_end,
    }
    if config.backend_name == "cuda":
        from octavo.backends.cuda import ranks as cuda  # imported late, as most engines have one rank

        return partial(cuda.load_ranks, **common)
    from octavo.backends.cpu.ranks import load_ranks

    group = None
    if config.nnodes > 1:
        from octavo.backends.cpu.nodes import Group

        config.need(config.node_rank == 0, "node_rank", "0, unless with octavo serve or octavo engine")
        group = Group.of(config, secrets, fingerprint(checkpoint))
    return partial(load_ranks, **common, group=group)


def _backend_settings(config: EngineConfig, max_model_len: int) -> dict[str, Any]:
    """Return the arguments of a BackendFactory that come from the settings."""
    return {
        "page_size": config.kv_cache_page_size,
        "max_batch_tokens": config.max_batch_tokens,
        "max_batch_size": max(config.max_batch_size, FREE_ROWS),  # draft tokens are sampled too
        "max_model_len": max_model_len,
        "threads": config.num_threads,
        "dtype": DTYPES[config.dtype],
        "quantization": config.quantization,
        "kv_cache_dtype": KV_CACHE_DTYPES[config.kv_cache_dtype],
        "device": config.device,
    }


def _page_fingerprint(checkpoint: Checkpoint, backend: Backend) -> str:
    """Return a hash of everything that determines the bits of a page's K and V, besides its tokens."""
    parts = (__version__, fingerprint(checkpoint), backend.arithmetic, backend.page_size)
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _silent(done: int, total: int) -> None:
    pass

"""Checks of what a server uses outside itself: its port, its folders with their disk space, and its KV store."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.engine_plan import size
from octavo.errors import ConfigError
from octavo.process_guard import lock_obstacle
from octavo.server.config import ServerConfig
from octavo.server.listeners import listen, unix_listener

from .finding import Finding, change, ok, stop

LOCAL = ("127.0.0.1", "localhost", "::1")
LITTLE = 2**30  # bytes of free disk space below which a warning is due


def check_places(config: EngineConfig, server: ServerConfig) -> Iterator[Finding]:
    """Yield the findings about the port, the folders and the KV store of a server. Creates nothing."""
    yield _port(server) if server.uds is None else _unix_socket(server.uds)
    yield from _tls(server)
    yield _clients(server)
    if server.data_dir is None:
        yield ok("data folder", "none: files, batches and stored responses need --data-dir DIR to survive a restart")
    else:
        yield _folder("data folder", "--data-dir", Path(server.data_dir))
    if config.kv_disk is not None:
        yield _folder(
            "KV folder", "--kv-disk", Path(config.kv_disk).expanduser(), config.kv_disk_size, "--kv-disk-size"
        )
    if config.kv_store is not None:
        yield _kv_store(config)
    if config.model_identity is not None:
        yield _memory_lock()
    yield _model_cache()


def _port(server: ServerConfig) -> Finding:
    where = server.host or "all addresses"
    try:
        listeners = listen(server.host, server.port)
    except ConfigError as error:
        return stop("port", str(error))
    for listener in listeners:
        listener.close()
    return ok("port", f"{server.port} on {where} is free" if server.port else f"a free one on {where} will be taken")


def _unix_socket(path: str) -> Finding:
    try:
        with unix_listener(path):
            return ok("socket", f"{path} can be listened on")
    except ConfigError as error:
        return stop("socket", str(error))


def _tls(server: ServerConfig) -> Iterator[Finding]:
    if server.ssl_certfile is None:
        return
    from octavo.server.edge.certificates import tls_context

    try:
        tls_context(server)
    except ConfigError as error:
        yield stop("TLS", str(error))
    else:
        yield ok("TLS", f"the certificate in {server.ssl_certfile} and its key fit")


def _memory_lock() -> Finding:
    """Return whether the weights of an encrypted model can be kept from swap."""
    if (reason := lock_obstacle()) is not None:
        return change("memory lock", f"decrypted weights may be swapped to disk: {reason}")
    return ok("memory lock", "decrypted weights are kept from being swapped to disk")


def _clients(server: ServerConfig) -> Finding:
    """Return who is served."""
    if server.has_keys:
        return ok("clients", "those that have an API key")
    if server.uds is not None:
        return ok("clients", "programs of this user and group on this machine, without a key")
    if server.ssl_cert_reqs == 2:
        return ok("clients", f"those that have a certificate signed by {server.ssl_ca_certs}")
    if server.host in LOCAL:
        return ok("clients", "all programs on this machine, without a key")
    return change(
        "clients",
        "everybody who can reach the port, without a key: set --keys or --api-key (docs/keys.md), or --host 127.0.0.1 "
        "behind a proxy",
    )


def _folder(subject: str, flag: str, folder: Path, wanted: int = LITTLE, setting: str = "") -> Finding:
    """Return whether a folder can be written or created, and whether `wanted` bytes are free beside what it holds."""
    if folder.exists() and not folder.is_dir():
        return stop(subject, f"{folder} is not a folder: give another {flag}")
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return stop(subject, f"user {os.getuid()} may not write in {there}: chown it, or give another {flag}")
    free = shutil.disk_usage(there).free
    found = f"{folder}, {size(free)} of disk space free" + ("" if folder.exists() else "; it will be created")
    held = _held(folder) if setting else 0
    if free + held < wanted:
        advice = (
            f"set {setting} to {size(free + held).replace(' ', '').replace(',', '')} or less"
            if setting
            else "free some"
        )
        return change(subject, f"{found}, less than {size(wanted)}: {advice}")
    return ok(subject, found)


def _kv_store(config: EngineConfig) -> Finding:
    """Return whether the shared store answers."""
    from octavo.kv.store.health import reason_of
    from octavo.kv.store.loading import load_store
    from octavo.kv.store.shared_pages import PROBE

    try:
        store = load_store(config)
    except ConfigError as error:
        return stop("KV store", str(error))
    try:
        store.has([PROBE])
    except Exception as error:  # a user's store may raise anything
        return change(
            "KV store", f"{store} cannot be used ({reason_of(error)}): correct --kv-store, or start the store"
        )
    finally:
        store.close()
    return ok("KV store", f"{store} answers")


def _model_cache() -> Finding:
    """Return whether models of the hub can be downloaded to its cache."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        return ok("model cache", f"{folder}; HF_HUB_OFFLINE is set, so nothing is downloaded")
    finding = _folder("model cache", "HF_HOME", folder)
    if finding.level == "stop":  # only models that must be downloaded need it
        return change("model cache", f"{finding.text}; until then, models cannot be downloaded")
    return finding


def _held(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0

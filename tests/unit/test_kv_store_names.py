"""What --kv-store may name: the URL of a Redis, or a class."""

import subprocess
import sys
from pathlib import Path

import pytest

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.kv.store.address import RedisAddress
from octavo.kv.store.loading import load_store


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://cache", RedisAddress("cache", 6379)),
        ("redis://cache:1/3", RedisAddress("cache", 1, database=3)),
        ("redis://[::1]:7/?db=2", RedisAddress("::1", 7, database=2)),
        ("redis://:p%40s%2Fs@h", RedisAddress("h", 6379, password="p@s/s")),
        ("rediss://me:pw@h?ssl_cert_reqs=none", RedisAddress("h", 6379, "", True, None, False, "me", "pw")),
        ("unix:///run/redis.sock?db=4", RedisAddress(path="/run/redis.sock", database=4)),
        ("unix://:pw@/run/redis.sock", RedisAddress(path="/run/redis.sock", password="pw")),
    ],
)
def test_addresses(url: str, expected: RedisAddress) -> None:
    address = RedisAddress.parse(url)
    fields = [name for name in RedisAddress.__slots__ if name != "shown"]
    assert [getattr(address, name) for name in fields] == [getattr(expected, name) for name in fields]
    assert "pw" not in address.shown and "p%40" not in address.shown


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *[("http://h", "kv_store must be a URL"), ("cache:6379", "kv_store must be"), ("redis://", "kv_store must be")],
        *[("redis://h:port", "Port"), ("redis://h:99999", "Port"), ("redis://h/x", "must be a number")],
        *[("redis://u:secret@h?what=1", "unknown option what"), ("rediss://h?ssl_cert_reqs=no", "ssl_cert_reqs")],
        *[("redis://:a/secret@h:6379", "write / in a password as %2F")],
        *[("redis://u:secret@:1", "kv_store must be"), ("nothing.here:Store", "cannot import nothing.here")],
        *[("json:Nothing", "json has no Nothing"), ("json:JSONDecoder", "not a subclass of Store")],
        *[("broken_store:Abstract", "its constructor raised TypeError"), ("broken_store:Failing", "ValueError: no")],
    ],
)
def test_names_that_are_refused(name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_store.py").write_text(
        "from octavo.kv.store import Store\n"
        "class Abstract(Store): ...\n"
        "class Failing(Store):\n"
        "    has = get = set = None\n"
        "    def __init__(self, config): raise ValueError('no')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        load_store(EngineConfig(kv_store=name))
    assert part in str(refusal.value)
    assert "\n" not in str(refusal.value) and "secret" not in str(refusal.value)


def test_a_store_needs_the_prefix_cache() -> None:
    with pytest.raises(ConfigError, match="enable_prefix_caching must be on with kv_disk, kv_host_memory or kv_store"):
        EngineConfig(kv_store="redis://h", enable_prefix_caching=False)


def test_a_server_without_a_store_does_not_import_it() -> None:
    code = "import octavo.engine.loading, sys; print([name for name in sys.modules if 'kv.store' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

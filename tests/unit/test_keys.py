"""API keys: the file, the limits, and what is refused."""

import asyncio
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.authentication import Authentication
from octavo.server.edge.key_use import KeyLimits
from octavo.server.errors import ApiError, error_headers
from octavo.tenants.key import Key, secret_hash
from octavo.tenants.key_file import add_key, read_keys, revoke_key, rotate_key
from octavo.tenants.key_ring import KeyRing
from octavo.tenants.local_limiter import LocalLimiter
from octavo.tenants.window import SlidingWindow

HASH = secret_hash("sk-x")


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_key_from_its_making_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.yaml"
    secret = add_key(path, name="alice", tenant="a team", requests_per_minute=5, models=["m"], expires="2030-01-01")
    other = add_key(path, name="bob")
    assert secret.startswith("sk-") and len(secret) > 40 and secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    alice, bob = read_keys(path)
    assert (alice.owner, bob.owner, alice.requests_per_minute, alice.models) == ("a team", "bob", 5, ["m"])
    ring = KeyRing(["plain"], path)
    assert (ring.find(secret), ring.find(other), ring.find("sk-wrong")) == (alice, bob, None)
    plain = ring.find("plain")
    assert plain is not None and plain.names_tenants
    fresh = rotate_key(path, "alice")
    until(lambda: ring.find(fresh) == read_keys(path)[0])
    assert ring.find(secret) is None
    path.write_text("keys: [")
    time.sleep(0.7)
    assert ring.find(fresh) and ring.find(other)  # those of before, while the file is wrong
    path.unlink()
    add_key(path, name="carol")
    until(lambda: ring.find(other) is None)


def test_changes_by_several_at_once_are_all_made(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    threads = [threading.Thread(target=add_key, args=(path,), kwargs={"name": f"k{n}"}) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path)} == {f"k{n}" for n in range(20)}
    path.chmod(0o640)
    revoke_key(path, "k7")
    assert len(read_keys(path)) == 19 and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(each.name for each in tmp_path.iterdir()) == [".keys.yaml.lock", "keys.yaml"]


WRONG = [
    ("", "has a list named keys"),
    ("keys: {}", "has a list named keys"),
    ("keys: [1]", "key 1 should be a mapping"),
    ("keys: [{name: a}]", "hash must be a SHA-256 hash in hexadecimal, not ''"),
    (f"keys: [{{name: a, hash: {HASH}, limit: 3}}]", "unknown field limit"),
    (f"keys: [{{name: a, hash: {HASH}, requests_per_minute: 0}}]", "requests_per_minute must be at least 1"),
    (f"keys: [{{name: a, hash: {HASH}, tokens_per_minute: 0}}]", "tokens_per_minute must be at least 1"),
    (f"keys: [{{name: a, hash: {HASH}, monthly_tokens: x}}]", "monthly_tokens must be"),
    (f"keys: [{{name: a, hash: {HASH}, weight: 0}}]", "weight must be from"),
    (f"keys: [{{name: a, hash: {HASH}, weight: 2, names_tenants: true}}]", "weight does not go with names_tenants"),
    (
        f"keys: [{{name: a, hash: {HASH}, weight: 2}}, {{name: b, hash: {'a' * 64}, tenant: a, weight: 3}}]",
        "the keys of the tenant 'a' have different weights",
    ),
    (f"keys: [{{name: a, hash: {HASH}, expires: soon}}]", "expires must be a date"),
    (f"keys: [{{name: ä, hash: {HASH}}}]", "name must be 1 to 64 printable characters of ASCII"),
    (f'keys: [{{name: a, hash: {HASH}, tenant: "a\\nb"}}]', "tenant must be"),
    (f"keys: [{{name: a, hash: {HASH}}}, {{name: b, hash: {HASH}}}]", "two keys have the hash of the key 'a'"),
    ("keys: [", "is not valid YAML"),
    (f"keys: [{{name: a, hash: {HASH}, expires: 2026-11-31}}]", "is not valid YAML: day is out of range"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_file_is_one_plain_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        KeyRing((), path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_mistakes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        KeyRing((), path)
    add_key(path, name="a")
    for call in (lambda: add_key(path, name="a"), lambda: rotate_key(path, "b"), lambda: revoke_key(path, "b")):
        with pytest.raises(ConfigError, match=r"already|no key named 'b'; it has a"):
            call()
    with pytest.raises(ConfigError, match="cannot be changed"):
        add_key(path / "below" / "keys.yaml", name="a")


@given(st.integers(1, 6), st.lists(st.floats(0, 20), max_size=60))
def test_a_window_is_exact(limit: int, gaps: list[float]) -> None:
    """As a search through all events of the last minute says; the wait is the least that helps."""
    window, now, taken = SlidingWindow(limit), 1000.0, list[float]()
    for gap in gaps:
        now += gap
        recent = [at for at in taken if at + 60 > now]
        wait = window.take(now)
        assert (wait == 0) == (len(recent) < limit)
        if wait == 0:
            taken.append(now)
        else:
            assert wait == pytest.approx(recent[len(recent) - limit] + 60 - now)
        assert window.remaining(now) == max(0, limit - len([at for at in taken if at + 60 > now]))


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def door(tmp_path: Path, clock: list[float]) -> Iterator[Any]:
    """Function that sends a request through the door, and the secrets of the keys in the file."""
    path = tmp_path / "keys.yaml"
    fields: dict[str, dict[str, Any]] = {
        "limited": {"requests_per_minute": 10},
        "narrow": {"routes": ["/v1/embeddings"], "tenant": "team"},
        "old": {"expires": "2020-01-01"},
        "busy": {"concurrent_requests": 2},
    }
    secrets = {name: add_key(path, name=name, **each) for name, each in fields.items()}

    def operator(scope: Any) -> None:
        raise ApiError(401, "operators only")

    limits = KeyLimits(LocalLimiter(lambda: clock[0]))
    authentication = Authentication(KeyRing(["plain"], path), operator, limits)

    def send(key: str | None, path: str = "/v1/models", *headers: tuple[bytes, bytes], form: str = "authorization"):
        secret = secrets.get(key or "", key)
        value = f"Bearer {secret}" if form == "authorization" else secret
        given = [(form.encode(), value.encode("latin-1"))] if secret is not None and value else []
        scope = {"path": path, "headers": [*given, *headers], "method": "GET", "client": None}
        record = RequestRecord("1", "GET", path, "-")
        asyncio.run(authentication.enter(scope, record))
        return record.use, scope, record

    yield send


def refusal(call: Any, *args: Any, **more: Any) -> tuple[int, str | None, dict[str, str]]:
    with pytest.raises(ApiError) as error:
        call(*args, **more)
    return error.value.status, error.value.code, dict(error_headers(error.value) or {})


def test_who_comes_in(door: Any) -> None:
    assert door(None, "/health")[0] is None
    for path in ("/v1/models", "/", "/docs", "/openapi.json", "/health/", "/HEALTH", "/nothing", "/v1/admin"):
        assert refusal(door, None, path)[:2] == (401, "missing_api_key")
        assert refusal(door, "sk-wrong", path) == (401, "invalid_api_key", {"www-authenticate": "Bearer"})
    assert refusal(door, "limited", "/stats")[0] == refusal(door, "plain", "/v1/admin/models")[0] == 401
    for form in ("authorization", "x-api-key", "api-key"):
        assert door("limited", form=form)[2].key.name == "limited"
    assert refusal(door, "old")[:2] == (401, "expired_api_key")
    assert refusal(door, "narrow", "/v1/embeddings-2")[:2] == (403, "route_not_allowed")
    assert door("narrow", "/v1/embeddings")[2].key.owner == "team"
    assert refusal(door, "pläin")[0] == 401


def test_the_tenant_is_the_keys(door: Any) -> None:
    other = (b"x-octavo-tenant", b"other")
    scope = door("narrow", "/v1/embeddings", other, other)[1]
    assert [value for name, value in scope["headers"] if name == b"x-octavo-tenant"] == [b"team"]
    assert other in door("plain", "/v1/models", other)[1]["headers"]  # whoever has such a key is trusted


def test_ten_minutes_at_five_times_the_rate(door: Any, clock: list[float]) -> None:
    """A key with 10 requests a minute gets exactly that; one that stays within is never refused."""
    passed = []
    for step in range(3000):
        clock[0] = step * 0.2
        try:
            *_, record = door("limited")
            passed.append(clock[0])
        except ApiError as error:
            headers = dict(error_headers(error) or {})
            at = clock[0] + int(headers["retry-after-ms"]) / 1000
            assert error.status == 429 and at == pytest.approx(passed[-10] + 60, abs=2e-3)
        door("narrow", "/v1/embeddings")
    assert len(passed) == 100
    clock[0] += 60
    record = door("limited")[2]
    limits = {name.decode(): value.decode() for name, value in record.response_headers}
    assert limits == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "60.000s",
    }


def test_requests_at_the_same_time(door: Any) -> None:
    first, second = door("busy")[0].leave, door("busy")[0].leave
    assert refusal(door, "busy") == (429, "rate_limit_exceeded", {"retry-after": "1", "retry-after-ms": "1000"})
    first()
    third = door("busy")[0].leave
    assert refusal(door, "busy")[0] == 429
    second(), third()


def test_dates() -> None:
    key = Key(name="a", hash=HASH, expires="2026-11-27T12:00:00+02:00")
    assert not key.is_expired(1795773599) and key.is_expired(1795773600)
    assert Key(name="a", hash=HASH, expires="2026-11-27").is_expired(1795737600)

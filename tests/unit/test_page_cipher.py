"""Encrypted KV pages and states on disk."""

import itertools
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import InvalidKVState
from octavo.formats.page_cipher import OVERHEAD, PageCipher, Tampered
from octavo.formats.page_file import PageFile, write_page_file
from octavo.kv import Prefix, root_key
from octavo.kv.tiers.disk import DiskTier
from octavo.kv.tiers.encrypted import EncryptedTier
from octavo.states.file import StateFile, read_saved_tokens, save_state

CIPHER, OTHER = PageCipher("01" * 32), PageCipher("02" * 32)
KEYS = [bytes([i]) * 16 for i in range(1, 5)]
PAGE_BYTES = 1000
TOKENS = range(70_000, 70_007)


def page_of(key: bytes) -> np.ndarray:
    return np.frombuffer(bytes(itertools.islice(itertools.cycle(key + b"content"), PAGE_BYTES)), np.uint8)


def tier(folder: Path, cipher: PageCipher = CIPHER, capacity: int = 1 << 20) -> EncryptedTier:
    return EncryptedTier(DiskTier(folder, capacity, PAGE_BYTES + OVERHEAD), cipher)


def pages(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.page"))


def test_what_was_sealed_opens_and_no_two_are_alike() -> None:
    sealed = {CIPHER.seal(b"content", b"name") for _ in range(1000)}
    assert len({text[:32] for text in sealed}) == 1000, "each has a salt, and so an AES key, of its own"
    assert all(CIPHER.open(text, b"name") == b"content" for text in sealed)
    assert CIPHER.name(KEYS[0]) != OTHER.name(KEYS[0]) != KEYS[0]


@given(st.binary(max_size=100), st.data())
def test_nothing_but_what_was_sealed_opens(content: bytes, data: Any) -> None:
    sealed = CIPHER.seal(content, b"name")
    position = data.draw(st.integers(0, len(sealed) - 1))
    changed = bytearray(sealed)
    changed[position] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(changed), sealed[:position], sealed + b"x"):
        with pytest.raises(Tampered):
            CIPHER.open(bad, b"name")
    for cipher, name in ((CIPHER, b"other"), (OTHER, b"name")):
        with pytest.raises(Tampered):
            cipher.open(sealed, name)


def test_pages_come_back_after_a_restart(tmp_path: Path) -> None:
    first = tier(tmp_path)
    assert all(first.write(key, page_of(key)) for key in KEYS)
    again = tier(tmp_path)
    for key in KEYS:
        content = again.read(key)
        assert content is not None and np.array_equal(content, page_of(key))
    names = {file.stem for file in pages(tmp_path)}
    assert names.isdisjoint(key.hex() for key in KEYS)
    assert not any(b"content" in file.read_bytes() for file in pages(tmp_path))


def test_a_changed_page_is_lost_and_counted(tmp_path: Path) -> None:
    first = tier(tmp_path)
    for key in KEYS[:3]:
        first.write(key, page_of(key))
    one, two, three = (tmp_path / CIPHER.name(key).hex()[:2] / f"{CIPHER.name(key).hex()}.page" for key in KEYS[:3])
    with PageFile(one) as file:  # a byte, with a checksum that fits
        sealed = file.read(CIPHER.name(KEYS[0])).copy()
    sealed[500] ^= 1
    write_page_file(one, len(sealed), [(CIPHER.name(KEYS[0]), sealed)])
    with PageFile(three) as file:  # another page, under this name
        write_page_file(two, len(sealed), [(CIPHER.name(KEYS[1]), file.read(CIPHER.name(KEYS[2])))])
    again = tier(tmp_path)
    assert [again.read(key) is None for key in KEYS[:3]] == [True, True, False]
    assert again.refused == 2
    assert KEYS[0] not in again and not one.exists(), "it can be written again"
    assert again.write(KEYS[0], page_of(KEYS[0])) and again.read(KEYS[0]) is not None


def test_another_key_starts_with_nothing_and_evicts_what_it_finds(tmp_path: Path) -> None:
    size = PAGE_BYTES + OVERHEAD + 200
    first = tier(tmp_path, capacity=3 * size)
    for key in KEYS[:2]:
        first.write(key, page_of(key))
    other = tier(tmp_path, OTHER, capacity=3 * size)
    assert not any(key in other for key in KEYS) and other.read(KEYS[0]) is None
    for key in KEYS:
        other.write(key, page_of(key))
    assert other.refused == 0 and len(pages(tmp_path)) == 3
    assert other.read(KEYS[-1]) is not None


# States


def save(path: Path, cipher: PageCipher | None = CIPHER) -> Prefix:
    root = root_key("f", "a", "")
    saved = Prefix(root, array("i", TOKENS), 2)
    save_state(
        path,
        tokens=TOKENS,
        fingerprint="f",
        metadata={"root": root.hex()},
        page_bytes=PAGE_BYTES,
        pages=[(saved.key(i), page_of(KEYS[i])) for i in range(3)],
        cipher=cipher,
    )
    return Prefix(root_key("f", "a", "", "kv-1"), array("i", TOKENS), 2)


def load(path: Path, cipher: PageCipher | None = CIPHER) -> StateFile:
    assert read_saved_tokens(path, "f", 80_000, "a", "", cipher) == list(TOKENS)
    return StateFile(path, "kv-1", 2, PAGE_BYTES, cipher)


def test_a_state_comes_back(tmp_path: Path) -> None:
    loaded = save(tmp_path / "state")
    state = load(tmp_path / "state")
    for i in range(3):
        content = state.read(loaded.key(i))
        assert content is not None and np.array_equal(content, page_of(KEYS[i]))
    content = (tmp_path / "state").read_bytes()
    tokens = [bytes([0xCE, *token.to_bytes(4, "big")]) for token in TOKENS]  # as MessagePack writes them
    for known in (*tokens, b"content", root_key("f", "a", "").hex().encode()):
        assert known not in content
    save(tmp_path / "plain", cipher=None)
    assert all(token in (tmp_path / "plain").read_bytes() for token in tokens), "the test knows what to look for"


def test_a_changed_byte_anywhere_in_a_state_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "state")
    content = (tmp_path / "state").read_bytes()
    zeros = range(44, 64)  # the unused end of the preamble
    for position in {*range(64), *range(64, len(content), 23), len(content) - 1} - {*zeros}:
        changed = bytearray(content)
        changed[position] ^= 1
        (tmp_path / "bad").write_bytes(changed)
        with pytest.raises(InvalidKVState):
            load(tmp_path / "bad")


def test_states_of_another_key_or_without_one_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "state")
    save(tmp_path / "plain", cipher=None)
    for name, cipher, message in (
        ("state", OTHER, "encrypted with another key"),
        ("state", None, "this server has no kv_key"),
        ("plain", CIPHER, "it is not encrypted"),
    ):
        with pytest.raises(InvalidKVState, match=message) as error:
            load(tmp_path / name, cipher)
        assert "\n" not in str(error.value)

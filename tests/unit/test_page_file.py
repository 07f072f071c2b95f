"""Page files and saved states: what was written comes back, or nothing does, whatever happened to the file."""

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import InvalidKVState
from octavo.formats.page_file import BadPageFile, PageFile, page_file_bytes, write_page_file
from octavo.kv import Prefix, root_key
from octavo.states.file import StateFile, read_saved_tokens, save_state

PAGE_BYTES = 200
KEYS = [bytes([k]) * 16 for k in range(3)]


def page_of(key: bytes, size: int = PAGE_BYTES) -> np.ndarray:
    """Random bytes, for each key its own."""
    return np.random.default_rng(list(key)).integers(0, 256, size, np.uint8)


def write_pages(path: Path, keys: list[bytes] = KEYS, **fields: Any) -> bytes:
    """Write the pages of `keys`; the file's bytes."""
    write_page_file(path, PAGE_BYTES, ((key, page_of(key)) for key in keys), **fields)
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"fingerprint": "abc", "tokens": [1, 2, 70000], "metadata": {"tenant": "é"}}
    write_pages(tmp_path / "pages", **fields, durable=True)
    with PageFile(tmp_path / "pages") as file:
        header = file.header
        assert (header.keys, header.page_bytes) == (KEYS, PAGE_BYTES)
        assert (header.fingerprint, header.tokens, header.metadata) == tuple(fields.values())
        for key in reversed(KEYS):
            assert key in file
            np.testing.assert_array_equal(file.read(key), page_of(key))
        with pytest.raises(BadPageFile):
            file.read(b"another")
    assert [path.name for path in tmp_path.iterdir()] == ["pages"]
    assert (tmp_path / "pages").stat().st_mode & 0o077 == 0, "others may read what was said"


def test_the_size_of_a_file_is_known_beforehand(tmp_path: Path) -> None:
    assert len(write_pages(tmp_path / "pages", KEYS[:1])) == page_file_bytes(PAGE_BYTES)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    before = write_pages(tmp_path / "pages")

    def contents(wrong: np.ndarray) -> Any:
        yield KEYS[0], page_of(KEYS[0])
        yield KEYS[1], wrong

    for wrong in (np.zeros(PAGE_BYTES + 1, np.uint8), np.zeros(PAGE_BYTES, np.int8)):
        with pytest.raises(ValueError, match="200 bytes"):
            write_page_file(tmp_path / "pages", PAGE_BYTES, contents(wrong))
    assert (tmp_path / "pages").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def read_all(path: Path) -> list[np.ndarray | None]:
    """The page of each key; None where it cannot be had."""
    pages: list[np.ndarray | None] = []
    for key in KEYS:
        try:
            with PageFile(path) as file:
                pages.append(file.read(key))
        except BadPageFile:
            pages.append(None)
    return pages


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """`original` with some of it flipped, cut off, cut out, put in, or replaced."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "truncate", "cut", "insert", "overwrite"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "truncate":
                del content[at:]
            case "cut":
                del content[at : at + draw(st.integers(1, 300))]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=300))
            case "overwrite":
                piece = draw(st.binary(min_size=1, max_size=300))
                content[at : at + len(piece)] = piece
    return bytes(content)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_a_damaged_file_gives_what_was_written_or_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    original = write_pages(folder / "good", tokens=range(100))
    (folder / "bad").write_bytes(data.draw(damaged(original)))
    for key, content in zip(KEYS, read_all(folder / "bad"), strict=True):
        assert content is None or np.array_equal(content, page_of(key))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """But for those of the zeros that nobody reads."""
    original = write_pages(tmp_path / "good", KEYS[:1])
    for at in [*range(44), *range(64, len(original))]:
        changed = bytearray(original)
        changed[at] ^= 1 << at % 8
        (tmp_path / "bad").write_bytes(changed)
        assert read_all(tmp_path / "bad")[0] is None, f"byte {at}"


def test_a_page_under_the_name_of_another_is_noticed(tmp_path: Path) -> None:
    original = write_pages(tmp_path / "good")
    first, second = (page_of(key).tobytes() for key in KEYS[:2])
    swapped = original.replace(first, b"?" * PAGE_BYTES).replace(second, first).replace(b"?" * PAGE_BYTES, second)
    (tmp_path / "bad").write_bytes(swapped)
    assert [content is None for content in read_all(tmp_path / "bad")] == [True, True, False]


def test_a_state_comes_back(tmp_path: Path) -> None:
    root = root_key("f", "a", "")
    saved, loaded = (Prefix(root_key("f", "a", "", origin), array("i", range(7)), 2) for origin in ("", "kv-1"))
    keys = [saved.key(0), saved.key(1), KEYS[0]]  # the last is not that of any of its tokens
    path = tmp_path / "state"
    save_state(
        path,
        tokens=range(7),
        fingerprint="f",
        metadata={"root": root.hex()},
        page_bytes=PAGE_BYTES,
        pages=zip(keys, map(page_of, KEYS), strict=True),
    )
    assert read_saved_tokens(path, "f", 7, "a", "") == list(range(7))
    state = StateFile(path, "kv-1", 2, PAGE_BYTES)
    assert [loaded.key(i) in state for i in range(3)] == [True, True, False]
    assert not any(key in state for key in keys), "pages are found by those who continue the state, and nobody else"
    read = state.read(loaded.key(1))
    assert read is not None and np.array_equal(read, page_of(KEYS[1]))
    assert not state.write(KEYS[2], page_of(KEYS[2]))

    content = path.read_bytes()
    with path.open("r+b") as file:  # damage to a page is found when it is asked for, and the rest is still of use
        file.seek(content.index(page_of(KEYS[0]).tobytes()))
        file.write(b"damage")
    assert state.read(loaded.key(0)) is None
    assert [loaded.key(i) in state for i in range(3)] == [False, True, False]
    state.close()
    assert state.read(loaded.key(1)) is None


def test_what_is_no_state_is_refused_in_one_line(tmp_path: Path) -> None:
    good = write_pages(tmp_path / "good")
    damages = {
        "not a file of KV pages": b"GGUF" + good,
        "incomplete": good[:-1],
        "header is damaged": good[:-1] + bytes([good[-1] ^ 1]),
        "has format 7": good[:8] + b"\x07" + good[9:],
    }
    for message, content in damages.items():
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(InvalidKVState, match=message) as error:
            StateFile(tmp_path / "bad", "kv-1", 2, PAGE_BYTES)
        assert "\n" not in str(error.value)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InvalidKVState, match="cannot read the KV state"):
            StateFile(path, "kv-1", 2, PAGE_BYTES)

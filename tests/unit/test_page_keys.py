"""The keys of pages, against hashlib's BLAKE2b."""

from array import array
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.kv import Prefix, page_keys
from octavo.kv import _page_keys as native

ROOT = bytes(range(16))
int32 = st.integers(-(2**31), 2**31 - 1)


def expected_keys(tokens: list[int], page_size: int) -> list[bytes]:
    keys, key = [], ROOT
    for start in range(0, len(tokens) - page_size + 1, page_size):
        key = blake2b(array("i", tokens[start : start + page_size]), salt=key, digest_size=16).digest()
        keys.append(key)
    return keys


@given(tokens=st.lists(int32, max_size=300), page_size=st.sampled_from([1, 3, 16, 31, 32, 33, 64, 100]))
def test_keys_are_a_chain_of_blake2b(tokens: list[int], page_size: int) -> None:
    keys = expected_keys(tokens, page_size)
    assert list(page_keys(ROOT, tokens, page_size)) == keys
    prefix = Prefix(ROOT, array("i", tokens), page_size)
    assert [prefix.key(i) for i in range(len(keys))] == keys


@given(tokens=st.lists(int32, min_size=8, max_size=64), data=st.data())
def test_a_prefix_grows_with_its_tokens(tokens: list[int], data: st.DataObject) -> None:
    prefix = Prefix(ROOT, array("i"), 4)
    while len(prefix.tokens) < len(tokens):
        size = len(prefix.tokens)
        prefix.tokens.extend(tokens[size : size + data.draw(st.integers(1, 9))])
        page = data.draw(st.integers(0, len(prefix.tokens) // 4))
        assert prefix.parent(page) == [ROOT, *expected_keys(tokens, 4)][page]


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (IndexError, (ROOT, [1, 2, 3], 2, 0, 2)),
        (IndexError, (ROOT, array("i", [1, 2, 3]), 2, 1, 1)),
        (IndexError, (ROOT, [1, 2, 3], 2**62, 4, 1)),
        (ValueError, (ROOT[1:], [1, 2], 2, 0, 1)),
        (ValueError, (ROOT, [1, 2], 0, 0, 1)),
        (ValueError, (ROOT, [1, 2**31], 2, 0, 1)),
        (OverflowError, (ROOT, [1, 2**63], 2, 0, 1)),
        (TypeError, (ROOT, [1, "2"], 2, 0, 1)),
        (TypeError, (ROOT, array("q", [1, 2]), 2, 0, 1)),
        (TypeError, (ROOT, (1, 2), 2, 0, 1)),
    ],
)
def test_what_is_no_page_of_tokens_is_refused(error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error):
        native.page_keys(*arguments)

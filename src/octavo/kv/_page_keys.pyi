"""The native extension module of page keys (csrc/kv/page_keys.cpp)."""

from array import array

def page_keys(parent: bytes, tokens: list[int] | array[int], page_size: int, first: int, count: int) -> list[bytes]:
    """Return the keys of pages [first, first + count) of `tokens`, given that of the page before them.

    Args:
        parent: 16 bytes.
        tokens: a list, or an array of C ints.
        page_size: tokens per page.

    Raises:
        IndexError: the pages end beyond the tokens.
        ValueError: a token is beyond 32 bits, or a parent has not 16 bytes.
    """

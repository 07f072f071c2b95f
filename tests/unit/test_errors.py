"""Errors cross process pools: pickled and unpickled, they are the same."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from octavo import errors

EVERY_ERROR = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.OctavoError)
]


def example(kind: type[errors.OctavoError]) -> errors.OctavoError:
    return errors.QueueFull("it is full", 3) if kind is errors.QueueFull else kind("it is full")


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_an_error_survives_pickling_and_copying(kind: type[errors.OctavoError]) -> None:
    error = example(kind)
    error.add_note("seen in a test")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind and str(again) == "it is full"
        assert vars(again) == vars(error)


def test_attributes_survive() -> None:
    assert pickle.loads(pickle.dumps(errors.QueueFull("full", 3))).retry_after == 3
    assert pickle.loads(pickle.dumps(errors.InvalidRequest("no", "seed"))).param == "seed"
    assert pickle.loads(pickle.dumps(errors.InvalidKVState("no"))).param == "kv_cache_state"


def refuse() -> None:
    raise errors.QueueFull("full", 3)


def test_an_error_comes_out_of_a_process_pool() -> None:
    with (
        ProcessPoolExecutor(1, get_context("forkserver")) as pool,
        pytest.raises(errors.QueueFull, match="full") as got,
    ):
        pool.submit(refuse).result(timeout=60)
    assert got.value.retry_after == 3

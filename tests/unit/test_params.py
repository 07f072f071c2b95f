"""SamplingParams and ServiceTerms: numpy's numbers count as numbers, True does not, and all of it can be sent."""

from decimal import Decimal
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
import pytest

from octavo import SamplingParams
from octavo.errors import InvalidRequest
from octavo.params import ServiceTerms


class Tenant(StrEnum):
    PREMIUM = "premium"


def sent(value: Any) -> Any:
    """As it arrives in the engine process."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))


@pytest.mark.parametrize(
    "given, plain",
    [
        ({"temperature": np.float64(0.7)}, {"temperature": 0.7}),
        ({"temperature": np.float32(0.5), "top_p": np.float16(0.5)}, {"temperature": 0.5, "top_p": 0.5}),
        ({"temperature": np.array(0.5)}, {"temperature": 0.5}),
        ({"temperature": 0}, {"temperature": 0.0}),
        (
            {"n": np.int64(2), "top_k": np.int32(5), "seed": np.uint64(2**64 - 1)},
            {"n": 2, "top_k": 5, "seed": 2**64 - 1},
        ),
        ({"ignore_eos": np.bool_(True)}, {"ignore_eos": True}),
        ({"stop_token_ids": [np.int64(3), 4]}, {"stop_token_ids": [3, 4]}),
        ({"stop_token_ids": np.array([3, 4])}, {"stop_token_ids": [3, 4]}),
        ({"stop_token_ids": (3, 4)}, {"stop_token_ids": [3, 4]}),
        ({"logit_bias": {np.int64(3): np.float32(1)}}, {"logit_bias": {3: 1.0}}),
        ({"stop": (np.str_("a"), Tenant.PREMIUM)}, {"stop": ["a", "premium"]}),
        ({"stop": np.str_("a")}, {"stop": "a"}),
    ],
)
def test_sampling_parameters_become_plain_python(given: dict[str, Any], plain: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    assert params == sent(params) == SamplingParams(**plain)
    for name, value in plain.items():
        stored = getattr(params, name)
        assert type(stored) is type(value)
        if isinstance(value, list):
            assert list(map(type, stored)) == list(map(type, value))


@pytest.mark.parametrize(
    "given",
    [
        {"stop_token_ids": [True]},
        {"stop_token_ids": [np.bool_(True)]},
        {"stop_token_ids": [1.0]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": np.array([[1]])},
        {"stop_token_ids": "12"},
        {"logit_bias": {True: 1.0}},
        {"logit_bias": {1: True}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": [1]},
        {"n": True},
        {"n": np.bool_(True)},
        {"n": 1.0},
        {"n": np.float64(1)},
        {"temperature": "0.7"},
        {"temperature": np.bool_(False)},
        {"temperature": np.array([0.7])},
        {"temperature": np.float64("nan")},
        {"temperature": 10**400},
        {"temperature": Decimal("0.7")},
        {"ignore_eos": 1},
        {"ignore_eos": None},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [b"a"]},
        {"stop": {"a": 1}},
        {"seed": 1.5},
    ],
)
def test_what_is_no_value_of_a_parameter_is_refused(given: dict[str, Any]) -> None:
    [name] = given
    with pytest.raises(InvalidRequest, match=f"^{name} must be [^\n]+, not ") as refused:
        SamplingParams(**given)
    assert refused.value.param == name


def test_an_error_message_shows_the_beginning_of_a_long_value() -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(stop=["x" * 1_000_000, ""])
    assert len(str(refused.value)) < 400


def test_service_terms_become_plain_python() -> None:
    terms = ServiceTerms(
        priority=np.int64(3), tenant=Tenant.PREMIUM, timeout=np.float32(0.5), ttft_target=2, cache_salt=np.str_("s")
    )
    assert (
        terms == sent(terms) == ServiceTerms(priority=3, tenant="premium", timeout=0.5, ttft_target=2.0, cache_salt="s")
    )
    kinds = [type(getattr(terms, name)) for name in ("priority", "tenant", "timeout", "ttft_target", "cache_salt")]
    assert kinds == [int, str, float, float, str]


@pytest.mark.parametrize(
    "given",
    [
        {"priority": True},
        {"priority": 1.0},
        {"tenant": 5},
        {"tenant": "a\x1b"},
        {"timeout": 0},
        {"timeout": True},
        {"timeout": np.inf},
        {"ttft_target": -1},
        {"cache_salt": ""},
        {"cache_salt": b"s"},
    ],
)
def test_what_is_no_value_of_a_term_is_refused(given: dict[str, Any]) -> None:
    [name] = given
    with pytest.raises(InvalidRequest, match=f"^{name} must be ") as refused:
        ServiceTerms(**given)
    assert refused.value.param == name

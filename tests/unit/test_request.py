"""What a caller asks for, checked where it is made: a wrong value of any type is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from septet.errors import InvalidRequest
from septet.request import GREEDY_BELOW, Request, SamplingParams

HUGE = 10**5000  # Python refuses to print it


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", 10**400), ("temperature", None),
        ("top_p", float("nan")), ("min_p", -(10**400)), ("repetition_penalty", float("inf")),
        ("seed", HUGE), ("n", HUGE), ("n", True), ("top_k", 1.0),
        ("ignore_eos", "no"), ("ignore_eos", 1), ("skip_special_tokens", None), ("include_stop_str_in_output", "x"),
        ("stop", "x"), ("stop", b"x"), ("stop", 5), ("stop", None), ("stop", {"x"}), ("stop", ("",)), ("stop", (5,)),
        ("stop_token_ids", 5), ("stop_token_ids", None), ("stop_token_ids", (-1,)), ("stop_token_ids", (True,)),
        ("logit_bias", None), ("logit_bias", [1]), ("logit_bias", {"1": 1.0}), ("logit_bias", {1: 10**400}),
        ("logit_bias", {1: float("nan")}), ("max_tokens", 0), ("min_tokens", -1), ("logprobs", 21),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_a_wrong_value_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("field", "value"), [("id", ""), ("id", 5), ("priority", "high"), ("priority", 2**31), ("cache_salt", None)]
)
def test_a_request_that_no_wire_could_carry_is_refused(field: str, value: Any) -> None:
    values: dict[str, Any] = {"id": "a", "tokens": (1,), "params": SamplingParams()}
    with pytest.raises(InvalidRequest, match=field):
        Request(**{**values, field: value})


def test_whole_numbers_serve_as_numbers() -> None:
    params = SamplingParams(temperature=1, top_p=1, logit_bias={3: -100}, stop=["a"], stop_token_ids=[5])
    assert not params.greedy


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-38).greedy
    assert not SamplingParams(temperature=GREEDY_BELOW).greedy

"""What is said of a field that is wrong."""

from typing import Annotated, Any

import pytest
from pydantic import AfterValidator, ValidationError

from moduleformer_ext.records import Count, Fraction, InnerFraction, Record, Seed, Text, complaint


def _even(value: int) -> int:
    if value % 2:
        raise ValueError(f"must be even, got {value}")
    return value


class Example(Record):
    count: Count = 1
    fraction: Fraction = 0.5
    inner: InnerFraction = 0.5
    seed: Seed = 0
    text: Text = ""
    even: Annotated[int, AfterValidator(_even)] = 0
    needed: int


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"count": 0}, ("count", "must be at least 1, got 0")),
        ({"count": "x"}, ("count", "must be a valid integer, unable to parse string as an integer, got x")),
        ({"count": ""}, ("count", "must be a valid integer, unable to parse string as an integer, got ''")),
        ({"fraction": 1.5}, ("fraction", "must be at most 1, got 1.5")),
        ({"fraction": float("nan")}, ("fraction", "must be a finite number, got nan")),
        ({"inner": 0}, ("inner", "must be above 0, got 0")),
        ({"inner": 1}, ("inner", "must be below 1, got 1")),
        ({"seed": 2**63}, ("seed", f"must be at most {2**63 - 1}, got {2**63}")),
        ({"text": "a\udcff"}, ("text", "must be UTF-8 text, got 'a\\udcff'")),
        ({"even": 3}, ("even", "must be even, got 3")),
        ({"needed": None}, ("needed", "must be a valid integer, got None")),
        ({"other": 3}, ("other", "is unknown")),
    ],
)
def test_complaints(fields: dict[str, Any], said: tuple[str, str]) -> None:
    with pytest.raises(ValidationError) as raised:
        Example(**{"needed": 1, **fields})
    assert complaint(raised.value) == said


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValidationError) as raised:
        Example()  # type: ignore[call-arg]
    assert complaint(raised.value) == ("needed", "must be given")


def test_long_values_are_cut() -> None:
    with pytest.raises(ValidationError) as raised:
        Example(needed="x" * 1000)  # type: ignore[arg-type]
    assert complaint(raised.value)[1].endswith(f"got {'x' * 80}...")


def test_records_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Example(needed=1).count = 3  # type: ignore[misc]

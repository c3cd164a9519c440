"""Typed records of plain values: what an option or a field of a file may be is said by its annotation alone."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


class Record(BaseModel):
    """Base of the options and file contents that pydantic checks: they do not change, unknown fields are errors, and
    numbers are finite.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True)


def _check_text(text: str) -> str:
    """A word of the command line that is not UTF-8 has surrogates, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"must be UTF-8 text, got {text!r}") from error
    return text


Text = Annotated[str, AfterValidator(_check_text)]
_LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=_LARGEST)]
Natural = Annotated[int, Field(ge=0, le=_LARGEST)]
Lanes = Annotated[int, Field(ge=1, le=2**16)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
InnerFraction = Annotated[float, Field(gt=0, lt=1)]

_WORDS = {
    "Input should be greater than or equal to": "must be at least",
    "Input should be less than or equal to": "must be at most",
    "Input should be greater than": "must be above",
    "Input should be less than": "must be below",
    "Input should be": "must be",
}


def complaint(error: ValidationError) -> tuple[str, str]:
    """The name of the first field that is wrong, empty for the record as a whole, and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    match first["type"]:
        case "missing" | "missing_argument":
            return name, "must be given"
        case "unexpected_keyword_argument" | "extra_forbidden":
            return name, "is unknown"
        case "value_error":
            return name, str(first["ctx"]["error"])
        case "json_invalid":
            return name, f"is not valid JSON: {first['ctx']['error']}"
    message = first["msg"]
    for theirs, ours in _WORDS.items():
        if message.startswith(theirs):
            return name, f"{ours}{message.removeprefix(theirs)}, got {_shown(first['input'])}"
    return name, f"is not valid: {message}, got {_shown(first['input'])}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

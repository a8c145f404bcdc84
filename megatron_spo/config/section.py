"""Base class of the configuration sections, and types that several keys share."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import ErrorDetails

T = TypeVar("T")
FORMATS = ("one", "each", "word")
"""Tags of the alternative types of a key. They appear in pydantic's error locations and are not part of key names."""


class Section(BaseModel):
    """Base class of all sections: immutable, with strict types; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        """Rejects strings that cannot be file names or be written to UTF-8 files."""
        if isinstance(value, str):
            if "\0" in value:
                raise ValueError("contains a NUL character")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("contains text that cannot be encoded in UTF-8") from None
        return value


def message_of(details: ErrorDetails) -> str:
    """Returns what is wrong with a value, to be written after it: `must be ...`."""
    message = details["msg"].replace("Input should be", "must be").replace("Input should have", "must have")
    return message.removeprefix("Value error, ")


def as_tuple(value: Any) -> Any:
    """Converts a list to a tuple, because YAML has only lists."""
    return tuple(value) if isinstance(value, list) else value


def form(value: Any) -> str:
    """Returns the tag for a key whose value is a single value ("one") or a list ("each")."""
    return "each" if isinstance(value, list) else "one"


def form_of_v(value: Any) -> str:
    """Returns the tag for a key whose value is a number ("one") or a word ("word")."""
    return "word" if isinstance(value, str) else "one"


Decay = Annotated[float, Field(ge=0, lt=1)]
OneOrEach = Annotated[Annotated[T, Tag("one")] | Annotated[list[T | None], Tag("each")], Discriminator(form)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

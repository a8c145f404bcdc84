"""What the sections of a configuration are made of: their base class, and types that several keys share."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

T = TypeVar("T")
FORMS = ("one", "each", "word")
"""The forms in which some keys may be given; in pydantic's error locations, not in any key's name."""


class Section(BaseModel):
    """Frozen, strict about types, and an unknown key is an error."""

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
        """Texts are names of files, or are written to them."""
        if isinstance(value, str):
            if "\0" in value:
                raise ValueError("holds a NUL character")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("holds text that cannot be encoded in UTF-8") from None
        return value


def as_tuple(value: Any) -> Any:
    """YAML has lists only."""
    return tuple(value) if isinstance(value, list) else value


def form(value: Any) -> str:
    """Of a key that takes one value or a list with one for each of several."""
    return "each" if isinstance(value, list) else "one"


def form_of_v(value: Any) -> str:
    """Of a key that takes a number or a word."""
    return "word" if isinstance(value, str) else "one"


Decay = Annotated[float, Field(ge=0, lt=1)]
OneOrEach = Annotated[Annotated[T, Tag("one")] | Annotated[list[T | None], Tag("each")], Discriminator(form)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

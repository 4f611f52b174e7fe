"""What sections are made of: a closed base class, and bounded types that state their range."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError


def refusal(message: str, *, at: tuple[str, ...] = ()) -> PydanticCustomError:
    """An error to raise inside a validator; it reaches the reader word for word.

    Args:
        message: what is legal.
        at: the way from the value validated, a section, to the one that is wrong.
    """
    return PydanticCustomError("illegal", "{message}", {"message": message, "at": at})


def legal(words: str, *, boolean: bool = False) -> WrapValidator:
    """One message for every way in which a value can miss its type or its bounds.

    Booleans are refused unless ``boolean``: YAML reads ``yes`` and ``on`` as true, which Python
    would count as 1.
    """

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        if boolean or not isinstance(value, bool):
            try:
                return validate(value)
            except ValidationError:
                pass  # answered below, for all parts of a union at once
        raise refusal("must be " + words)

    return WrapValidator(check)


Count = Annotated[int, Field(ge=1), legal("a whole number of at least 1")]
CountFromZero = Annotated[int, Field(ge=0), legal("a whole number of at least 0")]
CountFromTwo = Annotated[int, Field(ge=2), legal("a whole number of at least 2")]
Seed = Annotated[int, Field(ge=0, lt=2**32), legal("a whole number in [0, 2^32)")]
Positive = Annotated[float, Field(gt=0), legal("a number above 0")]
NonNegative = Annotated[float, Field(ge=0), legal("a number of at least 0")]
AboveOne = Annotated[float, Field(gt=1), legal("a number above 1")]
Fraction = Annotated[float, Field(ge=0, lt=1), legal("a number in [0, 1)")]
Share = Annotated[float, Field(gt=0, le=1), legal("a number in (0, 1]")]
Interior = Annotated[float, Field(gt=0, lt=1), legal("a number in (0, 1)")]
Flag = Annotated[bool, Field(strict=True), legal("true or false", boolean=True)]
FolderName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"),
    legal("text of letters a-z, digits, '_', '-' and '.', starting with none of the last two"),
]
UserPath = Annotated[Path, legal("a path"), AfterValidator(Path.expanduser)]

RateOrAuto = Annotated[Positive | Literal["auto"], legal("a number above 0, or auto")]
CountOrAuto = Annotated[Count | Literal["auto"], legal("a whole number of at least 1, or auto")]
CountOrNull = Annotated[Count | None, legal("a whole number of at least 1, or null")]
AboveOneOrNull = Annotated[AboveOne | None, legal("a number above 1, or null")]
PositiveOrNull = Annotated[Positive | None, legal("a number above 0, or null")]
BytesOrNull = Annotated[
    Annotated[ByteSize, Field(ge=1), AfterValidator(int)] | None,
    legal('a whole number of bytes of at least 1, text with a unit such as "2 GiB", or null'),
]
FlagOrNull = Annotated[Flag | None, legal("true, false or null", boolean=True)]
Resume = Annotated[Literal[False] | str, legal("false, auto or a path", boolean=True)]
Betas = Annotated[tuple[Fraction, Fraction], legal("two numbers in [0, 1)")]
Counts = Annotated[tuple[Count, ...], legal("a list of whole numbers of at least 1")]
Milestones = Annotated[
    tuple[Interior, ...], Field(min_length=1), legal("a list of numbers in (0, 1)")
]


class Options(BaseModel):
    """A section of the configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def options(self) -> dict[str, Any]:
        """The section as keyword arguments, without the ``name`` that picks who takes them."""
        return self.model_dump(exclude={"name"})

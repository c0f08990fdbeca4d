"""Types of settings, and the base class of every group of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lumina.config.registry import FAMILIES, FORMATS, HEALTH_RULES, OBJECTIVES, SCHEDULES, TRACKERS

# What the tokenizer needs: cl100k_base and the special tokens above it, padded to a multiple of 128. lumina.chat owns
# the number; it is repeated here so that reading a configuration loads no tokenizer (a test holds the two together).
MIN_VOCAB = 100_352

# Lumina's own chat templates, the oldest first (lumina.chat.TEMPLATES, for the same reason).
ChatTemplate = Literal["im-roles-1", "im-roles-2"]
FIRST_TEMPLATE: ChatTemplate = "im-roles-1"  # of every run that records none

_LONGEST_NAME = 200  # bytes of a folder's name: file systems take 255, and files beside it have longer ones

FFN_MULTIPLE = 64  # rows of the feed-forward matrices are a multiple of this: whole tiles on tensor cores

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
FamilyName = Annotated[str, AfterValidator(FAMILIES.check)]
FormatName = Annotated[str, AfterValidator(FORMATS.check)]
ScheduleName = Annotated[str, AfterValidator(SCHEDULES.check)]
ObjectiveName = Annotated[str, AfterValidator(OBJECTIVES.check)]
RuleName = Annotated[str, AfterValidator(HEALTH_RULES.check)]
TrackerName = Annotated[str, AfterValidator(TRACKERS.check)]


def _run_name(name: str) -> str:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("it is no name of one folder inside output_dir")
    if any(len(part.encode("utf-8", "surrogatepass")) > _LONGEST_NAME for part in parts):
        raise ValueError(f"it has more than {_LONGEST_NAME} bytes, the most for a folder's name")
    if not name.isprintable():
        raise ValueError("it holds characters that cannot be shown")
    return name


RunName = Annotated[str, AfterValidator(_run_name)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _lists_of_one(cls, values: Any) -> Any:
        """A text or a mapping where a list of them is meant is the list of that one."""
        if not isinstance(values, dict):
            return values
        if any(isinstance(value, str) and "\0" in value for value in values.values()):
            raise ValueError("a text holds a NUL, which no path or name has")
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        return {name: [v] if name in lists and isinstance(v, str | dict) else v for name, v in values.items()}

"""response_format: text, any JSON object, or JSON of a schema."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import orjson
from pydantic import Field, field_validator, model_validator

from lumina.infer.serve.requests.strict import ANY, StrictModel
from lumina.infer.serve.requests.tools import GRAMMAR_BYTES, check_depth


class JsonSchema(StrictModel):
    # Answers always keep to the schema, strict or not.
    no_effect: ClassVar = {"name": (ANY,), "description": (ANY,), "strict": (ANY,)}

    schema_: dict[str, Any] = Field(alias="schema")

    @field_validator("schema_")
    @classmethod
    def _small(cls, value: Any) -> Any:
        if len(orjson.dumps(check_depth(value))) > GRAMMAR_BYTES:
            raise ValueError(f"is larger than {GRAMMAR_BYTES} bytes")
        return value


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema stands with the type of that name")
        return self

    def schema_of(self) -> dict[str, Any] | None:
        """What the answer is to keep to; None: it is text."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_

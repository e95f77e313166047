"""What every section of the configuration shares: strictness, common types of values, parts known by their kind."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Frozen, closed to unknown keys, and strict about types (no silent "3" -> 3)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def by_kind(*kinds: str) -> Discriminator:
    """Choose among sections by their `kind`; left out, it is the first."""

    def kind(part: Any) -> Any:
        return part.get("kind", kinds[0]) if isinstance(part, dict) else getattr(part, "kind", None)

    listed = " or ".join([", ".join(kinds[:-1]), kinds[-1]])
    return Discriminator(kind, custom_error_type="unknown_kind", custom_error_message=f"kind must be {listed}")

"""The base of everything that is read from a client's JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["StrictSchema"]


class StrictSchema(BaseModel):
    """Refuses fields that it does not know, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

"""Bodies of the routes that control an engine: what they share, and how they are read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import Field

from tokasaurus.server.http.bodies import read_optional_json
from tokasaurus.server.operations.schemas import RequestBody, body_reference, parse

__all__ = ["BodyRoute", "ControlBody", "Label", "add_routes_with_bodies", "read_body"]

Label = Annotated[str, Field(min_length=1, max_length=256)]
"""The name of a version of the weights."""


class ControlBody(RequestBody):
    """A body that may be missing."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


B = TypeVar("B", bound=ControlBody)
BodyRoute: TypeAlias = "tuple[str, Callable[[Request], Awaitable[Response]], type[ControlBody]]"


def add_routes_with_bodies(router: APIRouter, routes: Iterable[BodyRoute]) -> None:
    """Adds routes for POST, each with its path, handler and body."""
    for path, handler, schema in routes:
        body = body_reference(schema)
        body["required"] = any(each.is_required() for each in schema.model_fields.values())
        router.add_api_route(
            path,
            handler,
            methods=["POST"],
            response_model=None,
            name=path,
            openapi_extra={"requestBody": body},
        )


async def read_body(request: Request, schema: type[B]) -> B:
    """Raises RequestError if the body is wrong; names the field."""
    return parse(await read_optional_json(request), schema)

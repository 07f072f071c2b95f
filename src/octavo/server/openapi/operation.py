"""Operation: what the OpenAPI document says about one route, declared beside the route."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODEL = "{model}"  # in an example: the name of the server's default model


@dataclass(frozen=True, kw_only=True)
class Operation:
    """The description of a route. A type may be a pydantic model, any type of msgspec, or a JSON schema.

    Attributes:
        tag: The API that the route belongs to.
        summary: A sentence about what the route does.
        body: The type of a JSON body, or of the fields of a form; None for a route without a body.
        form: Whether the body is a form.
        example: A body that is answered with `status`. A value MODEL is replaced by a model's name.
        query: The types of query parameters by name.
        reply: The type of the answer; None for an empty one.
        media_type: The answer's, if it is not JSON.
        events: The type of the events of a stream, which `"stream": true` in the body selects.
        events_type: The media type of a stream.
        status: The status of an answer to a correct request. 501 for a route that only explains why it is missing.
        needs_key: Whether the route needs the admin key.
    """

    tag: str
    summary: str
    body: Any = None
    form: bool = False
    example: Any = None
    query: Mapping[str, Any] = field(default_factory=dict)
    reply: Any = None
    media_type: str = "application/json"
    events: Any = None
    events_type: str = "text/event-stream"
    status: int = 200
    needs_key: bool = False

    @property
    def types(self) -> list[Any]:
        """Return the types of bodies and answers."""
        return [kind for kind in (self.body, self.reply, self.events) if kind is not None]

"""A model's chat template: Jinja, sandboxed, with the conventions of Hugging Face's apply_chat_template."""

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo.errors import InvalidRequest


class ChatTemplate:
    """A compiled template. Templates come with the model, never with a request.

    Conventions: https://huggingface.co/docs/transformers/chat_templating_writing
    """

    def __init__(self, source: str) -> None:
        """Raises InvalidRequest if `source` is no valid template: such a model still completes plain prompts."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"this model's chat template is broken: {_one_line(error)}", "messages") from None

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The prompt of a conversation. Raises InvalidRequest, with the template's own complaint if it has one."""
        variables = {"add_generation_prompt": True, "tools": None, "documents": None} | variables
        try:
            return self._template.render(messages=_text_only(messages), **variables)
        except InvalidRequest:
            raise
        except Exception as error:  # a template is a program: it may fail in any way, on messages it does not expect
            reason = _one_line(error)
            raise InvalidRequest(f"the model's chat template refused the messages: {reason}", "messages") from None


def _text_only(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages checked for shape; content that is a list of text parts, joined: most templates want a string."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    joined = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"messages[{i}] must be an object with a role", "messages")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise InvalidRequest(f"messages[{i}].content may only have text parts", "messages")
            message = message | {"content": "\n".join(part["text"] for part in content)}
        elif content is not None and not isinstance(content, str):
            raise InvalidRequest(f"messages[{i}].content must be a string or a list of text parts", "messages")
        joined.append(message)
    return joined


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's tokens for training; to us it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise InvalidRequest(_one_line(message), "messages")


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__

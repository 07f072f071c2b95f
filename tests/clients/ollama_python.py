"""Ollama's client: chats, streams, tools given as functions, and structured output."""

import sys
from typing import Literal

import ollama
from pydantic import BaseModel, Field

client = ollama.Client(host=sys.argv[1])
question = [{"role": "user", "content": "How is the weather in Tromsø?"}]


class City(BaseModel):
    name: Literal["Oslo", "Tromsø"]
    people: int = Field(ge=0, le=9)


def weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: its name.
    """
    return f"fine in {city}"


assert client.list().models[0].model == "tiny"
assert client.chat("tiny", question).message.content == "The weather is fine."
assert "".join(part.message.content or "" for part in client.chat("tiny", question, stream=True)) == (
    "The weather is fine."
)
City.model_validate_json(client.chat("tiny", question, format=City.model_json_schema()).message.content or "")

called = client.chat("tiny", question, tools=[weather]).message
[call] = called.tool_calls or []
assert (call.function.name, call.function.arguments) == ("weather", {"city": "Tromsø"})
result = {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}
assert client.chat("tiny", [*question, called, result], tools=[weather]).message.content == "The weather is fine."

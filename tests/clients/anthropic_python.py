"""Anthropic's client: messages, streams, tools and the tool runner, structured output."""

import sys
from typing import Any, Literal

import anthropic
from anthropic import beta_tool
from pydantic import BaseModel

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=60)
question: Any = [{"role": "user", "content": "How is the weather in Tromsø?"}]
schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Tromsø"]}},
    "required": ["city"],
    "additionalProperties": False,
}
tool: Any = {"name": "weather", "description": "Weather of a city", "input_schema": schema}


class City(BaseModel):
    name: Literal["Oslo", "Tromsø"]
    is_capital: bool


@beta_tool
def weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: its name.
    """
    return f"fine in {city}"


reply = client.messages.create(model="tiny", max_tokens=64, messages=question)
assert reply.content[0].text == "The weather is fine.", reply

with client.messages.stream(model="tiny", max_tokens=64, messages=question, tools=[tool]) as stream:
    called = stream.get_final_message()
assert called.stop_reason == "tool_use", called
assert called.content[-1].input == {"city": "Tromsø"}, called
result = {"type": "tool_result", "tool_use_id": called.content[-1].id, "content": "fine"}
history: Any = [*question, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
answer = client.messages.create(model="tiny", max_tokens=64, messages=history, tools=[tool])
assert answer.content[0].text == "The weather is fine.", answer

forced = client.messages.create(
    model="tiny", max_tokens=64, messages=question, tools=[tool], tool_choice={"type": "tool", "name": "weather"}
)
assert forced.content[0].input["city"] in ("Oslo", "Tromsø"), forced

parsed = client.messages.parse(model="tiny", max_tokens=64, messages=question, output_format=City)
assert isinstance(parsed.parsed_output, City), parsed

runner = client.beta.messages.tool_runner(model="tiny", max_tokens=64, messages=question, tools=[weather], thread=False)
assert runner.until_done().content[0].text == "The weather is fine."

"""langchain-openai: chats, streams, tools, structured output by schema and by function, and the Responses API."""

import asyncio
import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

address: Any = {"model": "tiny", "base_url": f"{sys.argv[1]}/v1", "api_key": "none", "max_retries": 0}
model = ChatOpenAI(**address)
question = "How is the weather in Tromsø?"


class City(BaseModel):
    """A city."""

    name: Literal["Oslo", "Tromsø"]
    people: int = Field(ge=0, le=9)


@tool
def weather(city: str) -> str:
    """Weather of a city."""
    return f"fine in {city}"


assert model.invoke(question).content == "The weather is fine."
assert "".join(str(chunk.content) for chunk in model.stream(question)) == "The weather is fine."
assert asyncio.run(model.ainvoke(question)).content == "The weather is fine."
assert isinstance(OpenAI(**address, max_tokens=4).invoke("Hello"), str)

for method in ("json_schema", "function_calling"):
    assert isinstance(model.with_structured_output(City, method=method).invoke(question), City), method

with_tools = model.bind_tools([weather])
called = with_tools.invoke(question)
[call] = called.tool_calls
assert (call["name"], call["args"]) == ("weather", {"city": "Tromsø"})
result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
assert with_tools.invoke([HumanMessage(question), called, result]).content == "The weather is fine."
streamed = None
for chunk in with_tools.stream(question):
    streamed = chunk if streamed is None else streamed + chunk
assert streamed is not None and streamed.tool_calls[0]["args"] == {"city": "Tromsø"}

by_responses = ChatOpenAI(**address, use_responses_api=True)
assert by_responses.invoke(question).text == "The weather is fine."
assert by_responses.bind_tools([weather]).invoke(question).tool_calls[0]["args"] == {"city": "Tromsø"}

"""OpenAI's client for Python: chats, responses, structured output, tools, streams, files and batches."""

import asyncio
import io
import json
import sys
import time
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field

url = sys.argv[1]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
question: Any = [{"role": "user", "content": "How is the weather in Tromsø?"}]


class City(BaseModel):
    name: Literal["Oslo", "Tromsø"]
    people: int = Field(ge=0, le=9)


class Weather(BaseModel):
    """Weather of a city."""

    city: Literal["Oslo", "Tromsø"]


def chats() -> None:
    assert client.models.list().data[0].id == "tiny"
    reply = client.chat.completions.create(model="tiny", messages=question)
    assert reply.choices[0].message.content == "The weather is fine.", reply
    chunks = client.chat.completions.create(model="tiny", messages=question, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The weather is fine."


def structured_chats() -> None:
    parsed = client.chat.completions.parse(model="tiny", messages=question, response_format=City)
    assert isinstance(parsed.choices[0].message.parsed, City)
    with client.chat.completions.stream(model="tiny", messages=question, response_format=City) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert isinstance(final.choices[0].message.parsed, City)


def tools() -> None:
    weather: Any = openai.pydantic_function_tool(Weather, name="weather")
    forced = client.chat.completions.parse(
        model="tiny", messages=question, tools=[weather], tool_choice="required", parallel_tool_calls=False
    )
    [call] = forced.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)

    reply = client.chat.completions.create(model="tiny", messages=question, tools=[weather])
    assert reply.choices[0].finish_reason == "tool_calls", reply
    [call] = reply.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Tromsø"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "fine"}
    history = [*question, reply.choices[0].message, result]
    answer = client.chat.completions.create(model="tiny", messages=history, tools=[weather])
    assert answer.choices[0].message.content == "The weather is fine.", answer


def responses() -> None:
    reply = client.responses.create(model="tiny", input="Hello")
    assert reply.output_text == "The weather is fine."
    again = client.responses.create(model="tiny", input="And now?", previous_response_id=reply.id)
    assert again.status == "completed"
    parsed = client.responses.parse(model="tiny", input="Where?", text_format=City)
    assert isinstance(parsed.output_parsed, City)
    with client.responses.stream(model="tiny", input="Where?", text_format=City) as stream:
        assert "response.output_text.delta" in {event.type for event in stream}
        assert isinstance(stream.get_final_response().output_parsed, City)
    tool: Any = openai.pydantic_function_tool(Weather, name="weather")
    called = client.responses.parse(model="tiny", input="Where?", tools=[tool])
    assert [item.type for item in called.output] == ["function_call"], called
    call: Any = called.output[0]
    assert call.parsed_arguments == Weather(city="Tromsø"), call


def batches() -> None:
    body = {"model": "tiny", "messages": question}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = client.files.create(file=("rows.jsonl", io.BytesIO(json.dumps(row).encode())), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    deadline = time.monotonic() + 30
    while batch.status != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    assert "The weather is fine." in client.files.content(batch.output_file_id or "").text
    assert client.files.delete(file.id).deleted


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as many:
        replies = await asyncio.gather(
            *(many.chat.completions.parse(model="tiny", messages=question, response_format=City) for _ in range(8))
        )
        assert all(isinstance(reply.choices[0].message.parsed, City) for reply in replies)
        stream = await many.completions.create(model="tiny", prompt="Hello", max_tokens=4, stream=True)
        assert len([chunk async for chunk in stream]) > 1


chats()
structured_chats()
tools()
responses()
batches()
asyncio.run(asynchronous())

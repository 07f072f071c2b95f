"""pydantic-ai: an agent with a tool, typed output by tool and by schema, and streams, in chats and responses."""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="none")


class City(BaseModel):
    name: Literal["Oslo", "Tromsø"]
    people: int = Field(ge=0, le=9)


async def streamed(agent: Agent) -> str:
    async with agent.run_stream("How is the weather?") as result:
        return await result.get_output()


asked = []


def weather(city: str) -> str:
    """Weather of a city."""
    asked.append(city)
    return "fine"


for model in (OpenAIChatModel("tiny", provider=provider), OpenAIResponsesModel("tiny", provider=provider)):
    assert Agent(model).run_sync("Hello").output == "The weather is fine."
    assert isinstance(Agent(model, output_type=City).run_sync("Which city?").output, City)
    assert isinstance(Agent(model, output_type=NativeOutput(City)).run_sync("Which city?").output, City)

    agent = Agent(model, tools=[weather])
    assert agent.run_sync("How is the weather in Tromsø?").output == "The weather is fine."
    assert asyncio.run(streamed(agent)) == "The weather is fine."
assert asked == ["Tromsø"] * 4, asked

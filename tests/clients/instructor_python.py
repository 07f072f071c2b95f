"""instructor: typed answers by tool call, by JSON schema, and in parts."""

import sys
from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel, Field

question: Any = [{"role": "user", "content": "Which city is it?"}]


class City(BaseModel):
    name: Literal["Oslo", "Tromsø"]
    people: int = Field(ge=0, le=9)


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none"), mode=mode)
    city = client.chat.completions.create(model="tiny", messages=question, response_model=City, max_retries=0)
    assert isinstance(city, City), mode
    parts = list(client.chat.completions.create_partial(model="tiny", messages=question, response_model=City))
    assert City.model_validate(parts[-1].model_dump()), mode

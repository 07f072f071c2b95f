"""litellm: its providers openai, hosted_vllm, text-completion-openai, anthropic and ollama_chat, all at this server."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # not fetched from the internet

import asyncio
import sys
from typing import Any, Literal

import litellm
from pydantic import BaseModel, Field

url = sys.argv[1]
question = [{"role": "user", "content": "How is the weather in Tromsø?"}]
parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
weather = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": parameters}}


class City(BaseModel):
    name: Literal["Oslo", "Tromsø"]
    people: int = Field(ge=0, le=9)


def ask(provider: str, base: str, **options: Any) -> Any:
    return litellm.completion(
        f"{provider}/tiny", messages=question, api_base=base, api_key="none", timeout=60, **options
    )


for provider, base in (
    ("openai", f"{url}/v1"),
    ("hosted_vllm", f"{url}/v1"),
    ("anthropic", url),
    ("ollama_chat", url),
):
    text = ask(provider, base).choices[0].message.content
    assert text == "The weather is fine.", (provider, text)
    chunks = ask(provider, base, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "The weather is fine.", (provider, text)
    [call] = ask(provider, base, tools=[weather]).choices[0].message.tool_calls
    assert "Tromsø" in call.function.arguments or "Troms\\u00f8" in call.function.arguments, (provider, call)

for provider in ("openai", "hosted_vllm"):
    City.model_validate_json(ask(provider, f"{url}/v1", response_format=City).choices[0].message.content)
address = {"api_base": f"{url}/v1", "api_key": "none"}
text = litellm.text_completion("Hello", "text-completion-openai/tiny", max_tokens=4, **address)
assert isinstance(text.choices[0].text, str)
reply = asyncio.run(litellm.acompletion("openai/tiny", question, **address))
assert reply.choices[0].message.content == "The weather is fine."

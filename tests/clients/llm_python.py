"""llm, as a command and as a library: chats, schemas, tools, and the model from extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

folder = tempfile.TemporaryDirectory()
os.environ |= {"LLM_USER_PATH": folder.name, "LLM_LOAD_PLUGINS": ""}  # without plugins
Path(folder.name, "extra-openai-models.yaml").write_text(
    f"""
- model_id: octavo
  model_name: tiny
  api_base: {sys.argv[1]}/v1
  supports_schema: true
  supports_tools: true
"""
)

import llm  # noqa: E402 (it reads LLM_USER_PATH)


def weather(city: str) -> str:
    """Weather of a city."""
    return f"fine in {city}"


def command(*arguments: str) -> str:
    llm_command = str(Path(sys.executable).with_name("llm"))
    return subprocess.run([llm_command, *arguments], capture_output=True, text=True, check=True).stdout.strip()


schema = json.dumps({"type": "object", "properties": {"name": {"enum": ["Oslo", "Tromsø"]}}, "required": ["name"]})
assert command("-m", "octavo", "--key", "none", "Hello") == "The weather is fine."
assert json.loads(command("-m", "octavo", "--key", "none", "--schema", schema, "Which city?"))["name"]

model = llm.get_model("octavo")
model.key = "none"
assert model.prompt("Hello").text() == "The weather is fine."
assert model.prompt("Hello", stream=False).text() == "The weather is fine."
chain = model.chain("How is the weather in Tromsø?", tools=[weather])
assert chain.text().endswith("The weather is fine.")
[first, *_] = chain.responses()
assert first.tool_calls()[0].arguments == {"city": "Tromsø"}

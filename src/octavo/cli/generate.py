"""octavo generate: complete one prompt, streamed to stdout."""

import dataclasses
import sys
from typing import Annotated

import typer

from octavo.config import EngineConfig
from octavo.params import SamplingParams

from .engine_flags import engine_flags
from .sampling_flags import sampling_flags


def register(app: typer.Typer) -> None:
    app.command()(generate)


@engine_flags
@sampling_flags(max_tokens=256)
def generate(
    params: SamplingParams,
    config: EngineConfig,
    prompt: Annotated[str, typer.Argument(help="What to complete; - reads it from stdin.")],
    chat: Annotated[bool, typer.Option("--chat", help="Take the prompt as a message to answer.")] = False,
) -> None:
    """Complete a prompt, or answer it with --chat."""
    from octavo.llm import LLM

    text = sys.stdin.read() if prompt == "-" else prompt
    with LLM(**dataclasses.asdict(config)) as llm:
        request = llm.chat_tokens([{"role": "user", "content": text}]) if chat else text
        for increment in llm.stream(request, params):
            for output in increment.outputs:
                sys.stdout.write(output.text)
                sys.stdout.flush()
    sys.stdout.write("\n")

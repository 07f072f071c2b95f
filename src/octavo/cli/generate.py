"""octavo generate: complete one prompt, streamed to stdout."""

import sys
from typing import Annotated

import typer

from octavo.config import EngineConfig
from octavo.params import SamplingParams
from octavo.terminal import write_text

from .flags import Command, engine_flags, sampling_flags


def register(app: typer.Typer) -> None:
    app.command(cls=Command)(generate)


@engine_flags
@sampling_flags(max_tokens=256)
def generate(
    params: SamplingParams,
    config: EngineConfig,
    prompt: Annotated[str, typer.Argument(help="Text to complete; - reads it from stdin.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a chat message and print the answer.")
    ] = False,
) -> None:
    """Complete a prompt, or, with --chat, answer it."""
    from octavo.llm import LLM

    text = sys.stdin.read() if prompt == "-" else prompt
    with LLM.from_config(config) as llm:
        request = llm.chat_tokens([{"role": "user", "content": text}]) if chat else text
        for increment in llm.stream(request, params):
            for output in increment.outputs:
                write_text(output.text)
    write_text("\n")

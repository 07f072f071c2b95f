"""octavo chat: a conversation in the terminal. From a pipe, each line of stdin is a message."""

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.config import EngineConfig
from octavo.errors import InvalidRequest, PromptTooLong
from octavo.outputs import CompletionOutput
from octavo.params import SamplingParams
from octavo.terminal import console, printable, write_text

from .flags import Command, engine_flags, sampling_flags

if TYPE_CHECKING:
    from octavo.llm import LLM

_HELP = """\
/reset        start a new conversation
/system TEXT  start a new conversation with these instructions
/help         print this list
/exit         leave (also Ctrl-D); Ctrl-C stops an answer"""


def register(app: typer.Typer) -> None:
    app.command(cls=Command)(chat)


@engine_flags
@sampling_flags(max_tokens=None)
def chat(
    params: SamplingParams,
    config: EngineConfig,
    system: Annotated[
        str | None, typer.Option("--system", help="Instructions for the model: the system message.")
    ] = None,
) -> None:
    """Chat with a model in the terminal. From a pipe, each line of stdin is a message."""
    from octavo.llm import LLM

    with LLM.from_config(config) as llm:
        if not llm.tokenizer.has_chat_template:
            raise InvalidRequest(f"{config.model} has no chat template; use octavo generate instead")
        _Chat(llm, params, config.model_name, system).run()


class _Chat:
    """A conversation: reads lines, runs commands, streams answers. `messages` is the chat so far."""

    def __init__(self, llm: "LLM", params: SamplingParams, name: str, system: str | None) -> None:
        self.llm, self.params, self.name = llm, params, name
        # Not used for answers: Rich would expand tabs and wrap lines.
        self.remarks = console(stderr=True, soft_wrap=True)
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.restart(system)

    def restart(self, system: str | None) -> None:
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        self.say(f"{self.name} · /help lists the commands")
        for line in self.lines():
            command, _, rest = line.partition(" ")
            if not line:
                continue
            elif command == "/exit":
                break
            elif command == "/help":
                self.remarks.print(_HELP, style="dim")
            elif command == "/reset":
                self.restart(self.system)
                self.say("new conversation")
            elif command == "/system":
                self.restart(rest.strip())
                self.say(
                    "new conversation with these instructions"
                    if rest.strip()
                    else "new conversation without instructions"
                )
            elif command.startswith("/"):
                self.complain(f"unknown command {command}; /help lists the commands")
            else:
                self.answer(line)

    def lines(self) -> Iterator[str]:
        if not self.interactive:
            yield from (line.strip() for line in sys.stdin)
            return
        import readline  # noqa: F401 (gives input() line editing and the history of the arrow keys)

        while True:
            try:
                # \1 and \2 enclose characters that readline must not count as part of the line.
                yield input("\n\1\033[1;36m\2› \1\033[0m\2").strip()
            except KeyboardInterrupt:
                self.say("\nCtrl-D leaves")
            except EOFError:
                self.remarks.print()
                return

    def answer(self, line: str) -> None:
        """Stream the model's answer to `line`. An answer that Ctrl-C stops stays in the conversation."""
        self.messages.append({"role": "user", "content": line})
        text, tokens, start = "", 0, 0.0
        reason: str | None = None
        try:
            with closing(self.increments()) as increments:
                for output in increments:
                    start = start or time.perf_counter()
                    tokens += len(output.token_ids)
                    reason = output.finish_reason or reason
                    text += output.text
                    write_text(output.text)
        except InvalidRequest as error:
            self.messages.pop()
            self.complain(f"{error}; /reset starts again" if isinstance(error, PromptTooLong) else str(error))
            return
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            reason = "stopped"
        write_text("\n")
        self.messages.append({"role": "assistant", "content": text})
        self.report(tokens, time.perf_counter() - start, reason)

    def increments(self) -> Generator[CompletionOutput]:
        for increment in self.llm.stream(self.llm.chat_tokens(self.messages), self.params):
            yield from increment.outputs

    def report(self, tokens: int, seconds: float, reason: str | None) -> None:
        # The clock starts at the first token, so that token is not counted.
        speed = f" · {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 else ""
        end = {"stopped": " · stopped", "length": " · cut off: token limit reached"}.get(reason or "", "")
        self.say(f"{tokens} tokens{speed}{end}")

    def say(self, text: str) -> None:
        """Print a remark in a dim style, if both stdin and stdout are terminals."""
        if self.interactive:
            self.remarks.print(printable(text), style="dim")

    def complain(self, text: str) -> None:
        self.remarks.print(printable(text), style="red")

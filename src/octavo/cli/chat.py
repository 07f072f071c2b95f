"""octavo chat: a conversation in the terminal. From a pipe, each line of stdin is a message."""

import dataclasses
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

from .engine_flags import engine_flags
from .sampling_flags import sampling_flags

if TYPE_CHECKING:
    from octavo.llm import LLM

_HELP = """\
/reset        forget the conversation
/system TEXT  give the model its instructions, and start again
/help         this list
/exit         leave; so does Ctrl-D. Ctrl-C stops an answer."""


def register(app: typer.Typer) -> None:
    app.command()(chat)


@engine_flags
@sampling_flags(max_tokens=None)
def chat(
    params: SamplingParams,
    config: EngineConfig,
    system: Annotated[str | None, typer.Option("--system", help="Instructions for the model.")] = None,
) -> None:
    """Talk with a model in the terminal."""
    from octavo.llm import LLM

    with LLM(**dataclasses.asdict(config)) as llm:
        if not llm.tokenizer.has_chat_template:
            raise InvalidRequest(f"{config.model} has no chat template: try octavo generate")
        _Chat(llm, params, config.model_name, system).run()


class _Chat:
    """The loop of a conversation. `messages` is what the model is shown."""

    def __init__(self, llm: "LLM", params: SamplingParams, name: str, system: str | None) -> None:
        from rich.console import Console

        self.llm, self.params, self.name = llm, params, name
        # Rich would expand tabs and wrap words; the answers themselves go straight to stdout.
        self.remarks = Console(highlight=False, soft_wrap=True, stderr=True)
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
                self.remarks.print(_HELP, style="dim", markup=False)
            elif command == "/reset":
                self.restart(self.system)
                self.say("new conversation")
            elif command == "/system":
                self.restart(rest.strip())
                self.say("new conversation with these instructions" if rest.strip() else "no instructions any more")
            elif command.startswith("/"):
                self.complain(f"no command {command}; /help lists them")
            else:
                self.answer(line)

    def lines(self) -> Iterator[str]:
        if not self.interactive:
            yield from (line.strip() for line in sys.stdin)
            return
        import readline  # noqa: F401 (gives input() line editing and the history of the arrow keys)

        while True:
            try:
                # \1 and \2 tell readline which characters take no room on the line.
                yield input("\n\1\033[1;36m\2› \1\033[0m\2").strip()
            except KeyboardInterrupt:
                self.say("\nCtrl-D leaves")
            except EOFError:
                self.remarks.print()
                return

    def answer(self, line: str) -> None:
        """Stream the model's answer to `line`; what Ctrl-C cuts off stays in the conversation as far as it came."""
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
                    sys.stdout.write(output.text)
                    sys.stdout.flush()
        except InvalidRequest as error:
            self.messages.pop()
            self.complain(f"{error}; /reset starts again" if isinstance(error, PromptTooLong) else str(error))
            return
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            reason = "stopped"
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages.append({"role": "assistant", "content": text})
        self.report(tokens, time.perf_counter() - start, reason)

    def increments(self) -> Generator[CompletionOutput]:
        for increment in self.llm.stream(self.llm.chat_tokens(self.messages), self.params):
            yield from increment.outputs

    def report(self, tokens: int, seconds: float, reason: str | None) -> None:
        # The clock starts with the first token, which therefore does not count.
        speed = f" · {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 else ""
        end = {"stopped": " · stopped", "length": " · cut off at the limit of tokens"}.get(reason or "", "")
        self.say(f"{tokens} tokens{speed}{end}")

    def say(self, text: str) -> None:
        """A remark to a person, dim; nothing when the answers go elsewhere."""
        if self.interactive:
            self.remarks.print(text, style="dim", markup=False)

    def complain(self, text: str) -> None:
        self.remarks.print(text, style="red", markup=False)

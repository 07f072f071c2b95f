"""The command line, as a user runs it: real processes, real models, a real terminal."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import GREEDY, OCTAVO, Terminal, answer, complaint, octavo
from octavo import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    """The tiny model in this process, to say what the commands should answer."""
    with LLM(str(tiny_llama), threads=1) as llm:
        yield llm


def greedy(llm: LLM, messages: list[dict[str, str]]) -> str:
    return llm.chat(messages, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0].text


# Help and usage


def test_help_names_the_commands_and_loads_nothing_slow() -> None:
    text = answer("--help")
    commands = {"serve", "generate", "chat", "config", "pull", "bench"}
    assert set(re.findall(r"^│ (\w+)  ", text, re.MULTILINE)) >= commands
    assert answer() == text  # no command: help
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from octavo.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "serve", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert not {"numpy", "httpx", "zmq", "tokenizers", "yaml", "octavo.engine"} & set(done.stderr.split())


def test_version() -> None:
    import octavo

    assert answer("--version") == f"octavo {octavo.__version__}\n"


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
def test_help_of_a_command_names_every_setting(command: str) -> None:
    import dataclasses

    from octavo import EngineConfig

    text = answer(command, "--help", COLUMNS="200")
    for field in dataclasses.fields(EngineConfig):
        assert f"--{field.name.replace('_', '-')} " in text


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["genrate", "smollm2", "hi"], "Did you mean 'generate'"),
        (["nonsense"], "see octavo --help"),
        (["generate", "smollm2", "hi", "--temprature", "0"], "--temperature"),
        (["generate", "smollm2", "hi", "--max_batch_sise", "4"], "--max-batch-size"),
        (["generate", "smollm2"], "prompt"),
        (["generate", "smollm2", "hi", "there"], "there"),
        (["generate", "smollm2", "hi", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "smollm2", "hi", "--max-tokens", "-1"], "max_tokens must be an integer of at least 0"),
        (["generate", "smollm2", "hi", "--temperature=-1"], "temperature must be a number from 0"),
        (["generate", "smollm2", "hi", "--max_batch_size", "0"], "max_batch_size must be at least 1"),
        (["generate", "smollm2", "hi", "--kv-cache-memory", "lots"], "such as 4GiB"),
        (["chat", "smollm2", "--model", "other"], "two models"),
        (["chat", "no-such-directory/model.gguf"], "no-such-directory/model.gguf"),
        (["chat", "--config", "no-such-file.yaml"], "no-such-file.yaml"),
    ],
)
def test_a_slip_is_one_line_that_says_what_is_right(arguments: list[str], hint: str) -> None:
    assert hint in complaint(*arguments)


def test_damaged_file(smollm2: Path, tmp_path: Path) -> None:
    for size in (0, 100, 100_000, 10_000_000):
        with smollm2.open("rb") as whole:
            (tmp_path / "cut.gguf").write_bytes(whole.read(size))
        assert "cut.gguf" in complaint("generate", tmp_path / "cut.gguf", "hi")


def test_prompt_longer_than_the_context(tiny_llama: Path) -> None:
    assert "511 tokens" in complaint("generate", tiny_llama, "word " * 1000)


def test_text_that_is_not_unicode(tiny_llama: Path) -> None:
    assert "Unicode" in complaint("generate", tiny_llama, "-", stdin=b"caf\xe9", PYTHONIOENCODING="utf-8:strict")
    assert "Unicode" in complaint("generate", tiny_llama, os.fsdecode(b"caf\xe9"))


# generate


def test_generate_gives_the_text_that_llm_gives(tiny_llama: Path, llm: LLM) -> None:
    expected = llm.generate("The sea", SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0].text + "\n"
    assert answer("generate", tiny_llama, "The sea", *GREEDY) == expected
    assert answer("generate", tiny_llama, "-", *GREEDY, stdin="The sea") == expected
    assert answer("generate", tiny_llama, "The sea", *GREEDY, "--max_batch_tokens", "4", "--threads=1") == expected


def test_generate_chat_answers_the_message(tiny_llama: Path, llm: LLM) -> None:
    expected = greedy(llm, [{"role": "user", "content": "Hello"}]) + "\n"
    assert answer("generate", tiny_llama, "Hello", "--chat", *GREEDY) == expected


def test_generate_with_a_seed(tiny_llama: Path) -> None:
    seeded = [answer("generate", tiny_llama, "The sea", "--temperature", "1", "--seed", seed) for seed in "112"]
    assert seeded[0] == seeded[1] != seeded[2]
    assert len({answer("generate", tiny_llama, "The sea", "--temperature", "1") for _ in range(2)}) == 2


def test_real_model_answers() -> None:
    assert "Paris" in answer("generate", "smollm2", "What is the capital of France?", "--chat", *GREEDY)
    stopped = answer("generate", "smollm2", "One, two, three,", *GREEDY, "--stop", "seven", "--stop", " six")
    assert stopped == " four, five,\n"


def test_flags_win_over_the_file_and_the_file_over_the_environment(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text(f"model: {tiny_llama}\nmax-model-len: 3\n")
    prompt = "four or more tokens"
    model = str(tiny_llama)
    assert "than 2 tokens" in complaint("generate", model, prompt, "--config", file, OCTAVO_MAX_MODEL_LEN="100")
    assert answer("generate", model, prompt, "--config", file, *GREEDY, "--max-model-len", "100")
    file.write_text("max-modle-len: 3\n")
    assert "max-modle-len" in complaint("generate", model, prompt, "--config", file)


@pytest.fixture
def long_answer() -> Iterator[subprocess.Popen[bytes]]:
    """`octavo generate` in the middle of a long answer."""
    command = [*OCTAVO, "generate", "smollm2", "Once upon a time", "--temperature", "0", "--max-tokens", "4000"]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) and process.poll() is None  # the first text comes long before the last
        yield process
        process.kill()


def test_ctrl_c_ends_with_130_and_no_traceback(long_answer: subprocess.Popen[bytes]) -> None:
    long_answer.send_signal(signal.SIGINT)
    stdout, stderr = long_answer.communicate(timeout=20)
    assert (long_answer.returncode, stderr) == (130, b"")
    assert len(stdout) < 1000  # it had streamed, not gathered a buffer


def test_a_reader_that_leaves_ends_it_quietly(long_answer: subprocess.Popen[bytes]) -> None:
    assert long_answer.stdout is not None and long_answer.stderr is not None
    long_answer.stdout.close()
    assert long_answer.stderr.read() == b""
    assert long_answer.wait(timeout=20) in (0, 1)


# chat


def test_chat_over_a_pipe_keeps_the_conversation(tiny_llama: Path, llm: LLM) -> None:
    first = greedy(llm, [{"role": "user", "content": "Hello"}])
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    second = greedy(llm, [*history, {"role": "user", "content": "And you?"}])
    lines = "Hello\n\nAnd you?\n/reset\nHello\n/exit\nnever read\n"
    assert answer("chat", tiny_llama, *GREEDY, stdin=lines) == f"{first}\n{second}\n{first}\n"


def test_chat_system(tiny_llama: Path, llm: LLM) -> None:
    def told(system: str) -> str:
        return greedy(llm, [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}])

    lines = "Hello\n/system Be rude.\nHello\n/reset\nHello\n"
    expected = f"{told('Be kind.')}\n{told('Be rude.')}\n{told('Be rude.')}\n"
    assert answer("chat", tiny_llama, *GREEDY, "--system", "Be kind.", stdin=lines) == expected


def test_chat_goes_on_after_a_mistake(tiny_llama: Path, llm: LLM) -> None:
    lines = f"/rest\n{'word ' * 1000}\ncaf\udce9\nHello\n"
    done = octavo("chat", tiny_llama, *GREEDY, stdin=lines.encode(errors="surrogateescape"))
    assert done.returncode == 0
    assert done.stdout == greedy(llm, [{"role": "user", "content": "Hello"}]) + "\n"
    unknown, too_long, not_text = done.stderr.splitlines()
    assert "/rest" in unknown and "/reset" in too_long and "Unicode" in not_text


def test_chat_without_a_template(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer_config.json").unlink()
    assert "octavo generate" in complaint("chat", tmp_path)


def test_chat_in_a_terminal() -> None:
    terminal = Terminal("chat", "smollm2", "--temperature", "0")
    try:
        terminal.wait_for("› ")
        terminal.type("What is the capital of France?\r")
        terminal.wait_for("Paris")
        terminal.wait_for("tokens/s")
        terminal.wait_for("› ")
        terminal.type("Tell a very long story about the sea.\r")
        terminal.wait_for(r"the sea\.\r\n\w+")  # the echo, and the first words of the answer
        terminal.type("\x03")
        terminal.wait_for("stopped")
        terminal.wait_for("› ")
        terminal.type("/help\r")
        terminal.wait_for("/system TEXT")
        terminal.wait_for("› ")
        terminal.press_until("\x03", "Ctrl-D leaves")
        terminal.wait_for("› ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=20) == 0
    finally:
        terminal.close()

"""Ranks on several machines: the same answers as one process, whatever is lost; nobody else takes part."""

import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import numpy as np
import pytest
from namespaces import missing

from command_line import OCTAVO, complaint
from machines import Machines, machines
from octavo import LLM, SamplingParams
from octavo.backends.cpu import node_line, node_main, nodes
from octavo.backends.cpu.node_line import Line, Listener, connect
from octavo.backends.cpu.node_messages import Join, Link, Refused
from octavo.backends.cpu.node_pages import RemotePages, serve_pages
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from rank_requests import PARAMS, PROMPTS, answers, children, has_ended, ranks_of, wait_until
from server_process import free_port

SECRET, OTHER = "ab" * 32, "cd" * 32
PORT = 29501
ENGINE = b"engine_main"


class Nodes:
    """A server of one model on several machines, for a `with` block; it is ready when the block begins.

    Args:
        there: the machines.
        flags: of octavo serve, on all of them.
    """

    def __init__(self, there: Machines, count: int, folder: Path, model: Path, *flags: str):
        self.there, self.count, self.folder, self._model, self._flags = there, count, folder, model, flags
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        (folder / "secret").write_text(SECRET)
        transport = httpx.HTTPTransport(uds=str(folder / "socket"))
        self.client = httpx.Client(transport=transport, base_url="http://octavo", timeout=60)

    def start(self, node: int, *flags: str) -> subprocess.Popen[bytes]:
        words = [*OCTAVO, "serve", str(self._model), "--nnodes", str(self.count), "--node-rank", str(node)]
        words += ["--master-addr", self.there.ip(0), "--secret-file", str(self.folder / "secret"), "--threads", "1"]
        words += ["--served-model-name", "tiny", "--uds", str(self.folder / "socket"), *self._flags, *flags]
        with (self.folder / f"log-{node}").open("ab") as log:
            process = subprocess.Popen(self.there.command(node, *words), stdout=log, stderr=log)
        self.processes[node] = process
        return process

    def log(self, node: int) -> str:
        return (self.folder / f"log-{node}").read_text()

    def until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.processes[0].poll() is None, self.log(0)
            with contextlib.suppress(httpx.TransportError):
                return self.client.get("/ready").status_code == 200
            return False

        wait_until(is_ready, 60)

    def __enter__(self) -> "Nodes":
        for node in set(range(self.count)) - set(self.processes):
            self.start(node)
        self.until_ready()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.processes[0].terminate()
        codes = [process.wait(30) for process in self.processes.values()]
        assert kind is not None or codes == [0] * self.count, [self.log(node) for node in range(self.count)]

    def engine(self) -> int:
        [pid] = children(self.processes[0].pid, ENGINE)
        return pid

    def complete(self, seed: int, prompt: Any = "class", max_tokens: int = 150) -> Any:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "seed": seed, "ignore_eos": True}
        reply = self.client.post("/v1/completions", json=body | {"logprobs": 2})
        [choice] = reply.raise_for_status().json()["choices"]
        return choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.fixture(scope="module")
def four_machines() -> Iterator[Machines]:
    if reason := missing():
        pytest.skip(reason)
    with machines(4) as there:
        yield there


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """(model, prompts, settings) -> texts and logprobs of one process."""

    def run(name: str, prompts: list[Any], max_tokens: int, **settings: Any) -> list[Any]:
        params = [
            SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
            for seed in range(len(prompts))
        ]
        with LLM(str(tiny_model(name)), threads=1, **settings) as llm:
            outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        return [
            (output.text, [each[token].logprob for token, each in zip(output.token_ids, output.logprobs, strict=True)])
            for output in outputs
            if output.logprobs is not None
        ]

    return run


def texts(answered: list[Any]) -> list[str]:
    return [text for text, _ in answered]


@pytest.mark.parametrize(
    ("name", "count", "ranks", "quantization"),
    [
        pytest.param("llama-odd-heads", 2, 4, "8bit", id="two machines of two ranks, heads not divided"),
        pytest.param("llama-ranks", 4, 4, "4bit", id="four machines", marks=pytest.mark.exhaustive),
    ],
)
def test_same_answers_on_several_machines(
    four_machines: Machines, tiny_model: Callable[[str], Path], alone: Callable[..., Any], tmp_path: Path,
    name: str, count: int, ranks: int, quantization: str,
) -> None:  # fmt: skip
    expected = alone(name, PROMPTS, 12, quantization=quantization)
    flags = ("--quantization", quantization, "-tp", str(ranks), "--max-batch-tokens", "50")
    with (
        Nodes(four_machines, count, tmp_path, tiny_model(name), *flags) as served,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        found = list(pool.map(lambda seed: served.complete(seed, PROMPTS[seed], 12), range(len(PROMPTS))))
        assert texts(found) == texts(expected)
        for (_, got), (_, wanted) in zip(found, expected, strict=True):
            assert got == wanted


@pytest.fixture(scope="module")
def two_nodes(
    four_machines: Machines, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    with Nodes(four_machines, 2, folder, tiny_model("llama-ranks"), "-tp", "2", "--max-batch-size", "2") as served:
        yield served


def other_rank(served: Nodes) -> int:
    """The process of the rank on node 1, which comes anew after each of these tests."""
    served.until_ready()
    [rank] = children(served.processes[1].pid, b"rank_main")
    return rank


@contextlib.contextmanager
def under_load(served: Nodes, expected: list[Any]) -> Iterator[int]:
    """Some requests are running while the block begins, and all must be answered as if nothing happened.

    Yields the engine's process, which must have ended when the block ends.
    """
    engine = served.engine()
    with ThreadPoolExecutor(len(expected)) as pool:
        running = [pool.submit(served.complete, seed) for seed in range(len(expected))]
        wait(running, return_when=FIRST_COMPLETED)  # others are computed, and most wait
        yield engine
        assert [reply.result() for reply in running] == expected
    assert has_ended(engine)


def test_a_rank_of_another_machine_dies(two_nodes: Nodes, alone: Callable[..., Any]) -> None:
    expected = alone("llama-ranks", ["class"] * 8, 150)
    rank = other_rank(two_nodes)
    with under_load(two_nodes, expected) as engine:
        began = time.monotonic()
        os.kill(rank, signal.SIGKILL)
        wait_until(lambda: has_ended(engine))
        assert time.monotonic() - began < 2, "on a busy machine; else some milliseconds"
    assert "rank 1 on node 1 (10.77.0.2) has ended: killed by SIGKILL" in two_nodes.log(0)


def test_a_machine_dies(two_nodes: Nodes, alone: Callable[..., Any]) -> None:
    with under_load(two_nodes, alone("llama-ranks", ["class"] * 8, 150)) as engine:
        two_nodes.there.kill(1)
        two_nodes.processes[1].wait(30)
        wait_until(lambda: has_ended(engine), 2)
        two_nodes.start(1)


def test_a_machine_is_cut_off(two_nodes: Nodes, alone: Callable[..., Any]) -> None:
    """Without a packet that says so; and it comes back by itself."""
    expected = alone("llama-ranks", ["class"] * 8, 150)
    rank = other_rank(two_nodes)
    with under_load(two_nodes, expected) as engine:
        began = time.monotonic()
        two_nodes.there.cut(1)
        wait_until(lambda: has_ended(engine) and has_ended(rank))
        assert time.monotonic() - began < 8, "some four seconds, on an idle machine"
        two_nodes.there.join(1)
    assert "node 1 (10.77.0.2) has ended: its machine does not answer" in two_nodes.log(0)


def test_nobody_else_takes_part(four_machines: Machines, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Not a stranger who is silent, or talks something else; nor a node with another secret or another model."""
    model = tiny_model("llama-ranks")
    silent = "import socket, time; a = socket.create_connection(('10.77.0.1', 29501)); "
    noise = "b = socket.create_connection(('10.77.0.1', 29501)); b.sendall(b'GET / HTTP/1.1\\r\\n\\r\\n' * 9); "
    served = Nodes(four_machines, 2, tmp_path, model, "-tp", "2")
    served.start(0)
    wait_until(lambda: "waiting for node 1 of 2" in served.log(0), 60)
    strangers = subprocess.Popen(four_machines.command(2, "python3", "-c", f"{silent}{noise} time.sleep(60)"))
    try:
        (tmp_path / "other").write_text(OTHER)
        for flags, line in (
            (["--secret-file", str(tmp_path / "other")], "it has another secret, or none; give all nodes the same"),
            (["--model", str(tiny_model("llama-odd-heads"))], "it has another model than node 0"),
        ):
            words = [*OCTAVO, "serve", "--nnodes", "2", "--node-rank", "1", "--master-addr", "10.77.0.1"]
            words += ["--secret-file", str(tmp_path / "secret"), "-tp", "2", "--model", str(model), *flags]
            done = subprocess.run(four_machines.command(1, *words), capture_output=True, text=True, timeout=60)
            assert done.returncode == 2, done
            assert line in done.stderr and done.stderr.count("\n") == 1
        with served:
            assert served.complete(0)
            late = subprocess.run(four_machines.command(2, "python3", "-c", silent), capture_output=True, text=True)
            assert "ConnectionRefusedError" in late.stderr, "nobody is waited for any more"
    finally:
        strangers.kill()
        strangers.wait()
    assert "a connection from 10.77.0.3 was refused: it is no node of Octavo" in served.log(0)


@contextlib.contextmanager
def node(model: Path, port: int, *flags: str, number: int = 1, count: int = 2) -> Iterator[subprocess.Popen[str]]:
    """Another node on this machine, for an engine in this process."""
    words = ["serve", str(model), "--nnodes", str(count), "--node-rank", str(number), "--master-port", str(port)]
    command = [*OCTAVO, *words, "-tp", str(count), "--threads", "1", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.parametrize("name", ["llama-ranks", "llama-odd-heads"])
def test_pages_of_other_machines(
    tiny_model: Callable[[str], Path], name: str, tmp_path: Path, always_fetch: None
) -> None:
    """They are saved to a folder and to a KV state, copied for forks, and fetched again."""
    model, port, state_file = tiny_model(name), free_port(), tmp_path / "state.kv"
    several = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9, ignore_eos=True, logprobs=1)
    two = {"nnodes": 2, "master_port": port, "tensor_parallel_size": 2}
    found: list[Any] = []
    continued: list[Any] = []
    for settings in (two, {}, two):
        with contextlib.ExitStack() as stack:
            if settings:
                stack.enter_context(node(model, port))
            with LLM(str(model), threads=1, kv_disk=str(tmp_path / "pages"), speculative_tokens=2, **settings) as llm:
                outputs = llm.generate(PROMPTS, PARAMS)
                forks = [output.token_ids for output in llm.generate([[*PROMPTS[2], 9]], several)[0].outputs]
                found.append((answers(outputs), forks))
                assert outputs[2].metrics.cached_tokens == (128 if len(found) > 1 else 0)
                if state_file.exists():
                    state = llm.load_kv_cache_state(state_file)
                    [turn] = llm.generate([5, 6, 7], PARAMS[0], kv_cache_state=state)
                    assert turn.metrics.cached_tokens >= 128
                    continued.append(answers([turn]))
                llm.get_kv_cache_state(outputs[2].request_id).save(state_file)
    assert found[0] == found[1] == found[2] and continued[0] == continued[1]


def test_a_part_that_cannot_be_loaded(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same line on both machines, and no process is left."""
    model, port, load = tiny_model("llama-ranks"), free_port(), nodes.RemoteNode.load

    def load_wrongly(self: nodes.RemoteNode, settings: dict[str, Any]) -> None:
        load(self, settings | {"dtype": "float16"})

    monkeypatch.setattr(nodes.RemoteNode, "load", load_wrongly)
    with node(model, port) as other:
        with pytest.raises(ConfigError, match=r"bfloat16, not float16.* \(rank 1\)") as raised:
            LLM(str(model), tensor_parallel_size=2, nnodes=2, master_port=port, threads=1)
        ranks = ranks_of(other.pid)
        _, complaints = other.communicate(timeout=30)
        assert (other.returncode, complaints) == (2, f"octavo: {raised.value}\n")
        assert all(map(has_ended, ranks)) and not ranks_of(os.getpid())


def test_a_node_that_never_comes(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "PATIENCE", 0.5)
    with pytest.raises(ConfigError, match=r"node 1 of 2 did not come within 0\.5 s; start the same command"):
        LLM(str(tiny_model("llama-ranks")), tensor_parallel_size=2, nnodes=2, master_port=free_port())
    assert not ranks_of(os.getpid())


def test_an_engine_that_never_comes(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_main, "PATIENCE", 0.5)
    config = EngineConfig(
        model=str(tiny_model("llama-ranks")), tensor_parallel_size=2, nnodes=2, node_rank=1, master_port=free_port()
    )
    with pytest.raises(ConfigError, match=r"no engine has come for 0\.5 s.*\(Connection refused\)"):
        node_main.run_node(config, lambda text: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nnodes": 3}, "nnodes must be 1, 2, 4 or 8, not 3"),
        ({"tensor_parallel_size": 1}, "nnodes must be a divisor of tensor_parallel_size, not 2"),
        ({"node_rank": 2}, "node_rank must be from 0 to 1 with nnodes 2, not 2"),
        ({"node_rank": 1}, "node_rank must be 0, unless with octavo serve or octavo engine, not 1"),
        ({"master_addr": "10.0.0.1"}, "10.0.0.1 can be reached from other machines: give all nodes the same secret"),
        ({"master_addr": "no.such.invalid", "secret_file": "env:OCTAVO_SECRET_A"}, "no.such.invalid is unknown"),
    ],
)
def test_settings_that_cannot_work(
    tiny_model: Callable[[str], Path], settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_SECRET_A", SECRET)
    with pytest.raises(ConfigError, match=message):
        LLM(str(tiny_model("llama-ranks")), **{"nnodes": 2, "tensor_parallel_size": 2, **settings})


def test_several_models_on_several_machines(tiny_llama: Path) -> None:
    line = complaint("serve", tiny_llama, tiny_llama, "--nnodes", "2", "-tp", "2")
    assert "nnodes must be 1 with several models" in line


OWN = Join("1.0", 0, 2, 4, "model", "build", "amx")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Join("1.1", 1, 2, 4, "model", "build", "amx"), "it runs Octavo 1.1, and node 0 runs 1.0"),
        (Join("1.0", 2, 2, 4, "model", "build", "amx"), "it says that it is node 2, and there are nodes 1 to 1"),
        (Join("1.0", 1, 4, 4, "model", "build", "amx"), "nnodes 4 and tensor_parallel_size 4, and node 0 with 2 and 4"),
        (Join("1.0", 1, 2, 4, "model", "build", "avx2"), "set OCTAVO_ISA to an instruction set of both"),
        (Join("1.0", 1, 2, 4, "model", "other", "amx"), "install the same package"),
    ],
)
def test_nodes_that_differ_are_refused(other: Join, message: str) -> None:
    assert message in (OWN.problem(other) or "")
    assert OWN.problem(Join("1.0", 1, 2, 4, "model", "build", "amx")) is None


KEY, HERE = b"key", "127.0.0.1"


@pytest.fixture
def came() -> "SimpleQueue[Any]":
    """The first messages of those who were let in."""
    return SimpleQueue()


@pytest.fixture
def listener(came: "SimpleQueue[Any]", monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    monkeypatch.setattr(node_line, "HANDSHAKE", 1.0)
    with contextlib.closing(Listener(HERE, 0, KEY, Link | Refused, lambda _, message, __: came.put(message))) as made:
        yield made


@pytest.fixture
def stranger(listener: Listener) -> Iterator[Callable[[], socket.socket]]:
    """() -> a connection of somebody without the secret."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection((HERE, listener.port), 5))


def is_let_in(listener: Listener, came: "SimpleQueue[Any]") -> bool:
    line = connect((HERE, listener.port), KEY)
    line.send(Refused("x"))
    message = came.get(timeout=5)
    line.close()
    return bool(message == Refused("x"))


def is_cut_off(connection: socket.socket) -> bool:
    """Wait until the other side ends the connection."""
    connection.settimeout(10)
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return True


def test_a_handshake_takes_no_longer_than_it_may(
    listener: Listener, came: "SimpleQueue[Any]", stranger: Callable[[], socket.socket]
) -> None:
    """However slowly a stranger talks; meanwhile others are served."""
    began, slow = time.monotonic(), stranger()
    assert is_let_in(listener, came) and time.monotonic() - began < 1
    with contextlib.suppress(OSError):
        while time.monotonic() - began < 5:
            slow.sendall(b"o")
            time.sleep(0.1)
    assert time.monotonic() - began < 4


def test_a_first_message_takes_no_longer_than_it_may(listener: Listener) -> None:
    """Not even of somebody who has the secret, or where there is none: a byte at a time of the largest message."""
    began, line = time.monotonic(), connect((HERE, listener.port), KEY)
    with contextlib.suppress(OSError):
        line.socket.sendall(struct.pack("<I", 1 << 20))
        while time.monotonic() - began < 5:
            line.socket.sendall(b"o")
            time.sleep(0.1)
    assert time.monotonic() - began < 4


def test_many_strangers_keep_nobody_out(
    listener: Listener, came: "SimpleQueue[Any]", stranger: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are silent; each further one costs the oldest its place, and no more threads."""
    monkeypatch.setattr(node_line, "HANDSHAKE", 60.0)
    threads = threading.active_count()
    silent = [stranger() for _ in range(200)]
    assert is_let_in(listener, came)
    assert threading.active_count() - threads <= 33
    assert all(map(is_cut_off, silent[:160]))
    listener.close()
    assert all(map(is_cut_off, silent[160:]))


def test_a_proof_of_the_secret_is_worth_nothing_again(
    listener: Listener, came: "SimpleQueue[Any]", stranger: Callable[[], socket.socket]
) -> None:
    """Neither what a node has sent, nor what the listener has answered, when a stranger sends it again."""
    known, mine = stranger(), os.urandom(32)
    hello = b"octavo ranks 1\r\n" + mine
    known.sendall(hello)
    answer = Line(known).read(len(hello))
    numbers = mine + answer[-32:]
    proof = blake2b(numbers, key=KEY, person=b"connects", digest_size=32).digest()
    known.sendall(proof)
    proof_of_listener = Line(known).read(32)
    assert proof_of_listener == blake2b(numbers, key=KEY, person=b"accepts", digest_size=32).digest()
    for first in (hello, answer):
        for second in (proof, proof_of_listener):
            again = stranger()
            again.sendall(first + second + b"\0" * 100)
            assert is_cut_off(again)
    assert came.empty() and is_let_in(listener, came)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<I", 0xFFFFFFFF) + b"x" * 100,
        struct.pack("<I", 3) + b"\xdd\xff\xff",
        struct.pack("<I", 900_012) + b"\x82\xa4type\xa4Link\xa1x" + b"\x91" * 899_999,
        struct.pack("<I", 20) + b"\x82\xa4type\xa4Link\xa5group\xa2\xff\xff",
    ],
    ids=["4 GiB long", "an array without an end", "too deep", "no text"],
)
def test_a_first_message_that_is_none(
    listener: Listener, came: "SimpleQueue[Any]", caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    line = connect((HERE, listener.port), KEY)
    with contextlib.suppress(OSError):  # it may be cut off before all is sent
        line.socket.sendall(content)
    assert is_cut_off(line.socket)
    wait_until(lambda: caplog.messages)
    assert "it has sent what is no message" in caplog.messages[0]
    assert came.empty() and is_let_in(listener, came)


@pytest.mark.parametrize(
    ("sent", "line"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" * 9, "it is no node of Octavo, or of another version"),
        (b"octavo ranks 2\r\n" + b"x" * 32, "it is no node of Octavo, or of another version"),
        (b"octavo", "it has hung up"),
    ],
    ids=["HTTP", "another version", "nothing"],
)
def test_why_a_stranger_was_refused(
    stranger: Callable[[], socket.socket],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    sent: bytes,
    line: str,
) -> None:
    """Also if it resets the connection before it is answered."""
    monkeypatch.setattr(node_line, "_QUIET", 0.0)
    for _ in range(20):
        connection = stranger()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(sent)
        connection.close()
    wait_until(lambda: len(caplog.messages) == 20)
    assert all(f"a connection from {HERE} was refused: {line}" in message for message in caplog.messages)


def test_a_silent_stranger_is_told_of(stranger: Callable[[], socket.socket], caplog: pytest.LogCaptureFixture) -> None:
    assert is_cut_off(stranger())
    wait_until(lambda: caplog.messages)
    assert caplog.messages == [f"a connection from {HERE} was refused: it is silent, or too slow"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda pages: pages.read(4),
        lambda pages: pages.write(4, [np.zeros(8, np.uint8)] * 2),
        lambda pages: pages.copy(0, 4),
        lambda pages: pages.copy(4, 0),
    ],
    ids=["read", "write", "copy to", "copy from"],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_page_that_is_not_there(ask: Callable[[RemotePages], Any]) -> None:
    """The connection ends; before, pages that are there are served."""
    pools = [np.arange(32, dtype=np.uint8).reshape(4, 8), np.arange(32, 64, dtype=np.uint8).reshape(4, 8)]
    with socket.create_server((HERE, 0)) as server:
        asking = Line(socket.create_connection(server.getsockname()))
        answering = Line(server.accept()[0])
    thread = threading.Thread(target=serve_pages, args=(answering, pools))
    thread.start()
    pages = RemotePages(asking, [8, 8])
    pages.copy(3, 0)
    pages.write(1, pages.read(2))
    expected = [pool[[3, 2, 2, 3]].tolist() for pool in pools]
    with pytest.raises(OSError):
        ask(pages)
    thread.join(5)
    assert not thread.is_alive() and [pool.tolist() for pool in pools] == expected
    asking.close()
    answering.close()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses on which a listener has tried to listen, on a machine that has no address ::1."""
    tried: list[str] = []
    create = socket.create_server

    def create_server(address: Any, **options: Any) -> socket.socket:
        tried.append(address[0])
        if address[0] == "::1":
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return create((HERE, 0), **options)

    monkeypatch.setattr(socket, "create_server", create_server)
    return tried


def test_without_a_secret_nothing_listens_to_other_machines(made: list[str]) -> None:
    """With one, an address that the machine does not have means all that it has."""
    with pytest.raises(ConfigError, match="Cannot assign"):
        Listener("::1", 29501, b"", Link, lambda *_: None)
    assert made == ["::1"]
    Listener("::1", 29501, KEY, Link, lambda *_: None).close()
    assert made == ["::1", "::1", ""]


def test_a_name_with_several_addresses(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that the machine has: localhost may stand for ::1 too where there is no IPv6."""
    found = [
        (family, socket.SOCK_STREAM, 0, "", (address, 29501))
        for family, address in ((socket.AF_INET6, "::1"), (socket.AF_INET, HERE))
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    Listener("localhost", 29501, b"", Link, lambda *_: None).close()
    assert made == ["::1", HERE]

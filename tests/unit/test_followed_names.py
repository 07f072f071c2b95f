"""The names of engines, looked up by a server that hangs, fails and changes its mind, and who joins and leaves then."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.address import Address
from octavo.network import followed, names
from octavo.network.followed import FollowedEngines
from octavo.network.names import MISSES, Names


class Server:
    """Knows what names stand for; a name whose answer is an event hangs until it is set, and is unknown then."""

    def __init__(self) -> None:
        self.answers: dict[str, list[str] | threading.Event] = {}
        self.asked: list[str] = []

    def look_up(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked.append(host)
        answer = self.answers.get(host, [host])
        if isinstance(answer, threading.Event):
            answer.wait(20)
            raise socket.gaierror(socket.EAI_AGAIN, "nobody knows")
        return [(socket.AF_INET, 1, 6, "", (number, port)) for number in answer]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr(socket, "getaddrinfo", server.look_up)
    monkeypatch.setattr(names, "PATIENCE", 0.05)
    monkeypatch.setattr(followed, "LOOK", 0.01)
    yield server
    for answer in server.answers.values():
        if isinstance(answer, threading.Event):
            answer.set()


def at(*hosts: str) -> list[Address]:
    return [Address(host, 7) for host in hosts]


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(main())


def test_a_name_that_hangs_holds_up_no_other(server: Server) -> None:
    """It is asked for once at a time, and its earlier answers count."""
    server.answers = {"slow.test": ["10.0.0.1"], "quick.test": ["10.0.0.2"]}

    async def scenario() -> None:
        looked = Names(at("slow.test", "quick.test"))
        assert await looked.look() == at("10.0.0.1", "10.0.0.2")
        server.answers |= {"slow.test": (answered := threading.Event()), "quick.test": ["10.0.0.2", "10.0.0.3"]}
        for _ in range(2 * MISSES):
            assert await looked.look() == at("10.0.0.1", "10.0.0.2", "10.0.0.3")
        assert server.asked.count("slow.test") == 2
        server.answers["slow.test"] = ["10.0.0.4"]
        answered.set()
        while await looked.look() != at("10.0.0.1", "10.0.0.4", "10.0.0.2", "10.0.0.3"):
            pass

    run(scenario)


def test_an_engine_may_be_missing_for_a_while(server: Server) -> None:
    async def scenario() -> None:
        looked = Names(at("name.test", "10.0.0.9"))
        server.answers["name.test"] = ["10.0.0.1", "10.0.0.2"]
        await looked.look()
        server.answers["name.test"] = ["10.0.0.1"]
        for _ in range(MISSES - 1):
            assert await looked.look() == at("10.0.0.1", "10.0.0.2", "10.0.0.9")
        assert await looked.look() == at("10.0.0.1", "10.0.0.9")
        assert server.asked.count("10.0.0.9") == 1  # a number stands for itself
        looked.set(at("10.0.0.9"))
        assert await looked.look() == at("10.0.0.9")

    run(scenario)


class Joined:
    """Stands for a frontend: the engines that it has, and those that have joined and left."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.events: list[str] = []

    def add_remote(self, connect: object, name: str, max_pause: float) -> Any:
        self.names.append(name)
        self.events.append(f"{name} joins")
        return SimpleNamespace(name=name, is_leaving=False)

    async def drain(self, replica: Any) -> None:
        self.names.remove(replica.name)
        self.events.append(f"{replica.name} leaves")


def following(scenario: Callable[[Joined, FollowedEngines], Awaitable[None]], *hosts: str) -> None:
    async def main() -> None:
        frontend: Any = Joined()
        engines = FollowedEngines(frontend, at(*hosts), None, "digest")
        engines._task = asyncio.create_task(engines._follow())
        try:
            await scenario(frontend, engines)
        finally:
            await engines.close()
            engines.destroy()

    run(main)


async def until(frontend: Joined, *hosts: str) -> None:
    while sorted(frontend.names) != [f"engine {host}:7" for host in hosts]:
        await asyncio.sleep(0.001)


def test_engines_join_and_leave_beside_a_name_that_hangs(server: Server) -> None:
    server.answers = {"hangs.test": threading.Event(), "name.test": ["10.0.0.1"]}

    async def scenario(frontend: Joined, engines: FollowedEngines) -> None:
        await until(frontend, "10.0.0.1")
        server.answers["name.test"] = ["10.0.0.2"]
        await until(frontend, "10.0.0.2")
        engines.set(at("hangs.test", "10.0.0.3"))
        await until(frontend, "10.0.0.3")

    following(scenario, "hangs.test", "name.test")


def test_addresses_that_change_during_a_look(server: Server) -> None:
    """The new ones are looked up before engines leave, so requests have a place to go; removed ones do not join."""
    server.answers = {"slow.test": threading.Event()}

    async def scenario(frontend: Joined, engines: FollowedEngines) -> None:
        await until(frontend, "10.0.0.1")
        engines.set(at("slow.test", "10.0.0.1", "10.0.0.2"))
        while "10.0.0.2" not in server.asked:
            await asyncio.sleep(0.001)
        engines.set(at("10.0.0.3"))
        await until(frontend, "10.0.0.3")
        assert frontend.events[1:] == ["engine 10.0.0.3:7 joins", "engine 10.0.0.1:7 leaves"]

    following(scenario, "slow.test", "10.0.0.1")

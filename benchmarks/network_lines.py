"""Machines joined by lines that can be cut: network namespaces, and tunnels whose packets a process passes on."""

import contextlib
import ctypes
import fcntl
import heapq
import multiprocessing
import os
import select
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import namespaces
from namespaces import ip

_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_CLONE_NEWNET = 0x40000000
_PACKET = 65_536


def missing() -> str | None:
    """Why this machine cannot have such lines; None if it can."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun"
    return namespaces.missing()


@dataclass
class Line:
    """What happens to packets between the center and one machine. May be changed at any time.

    Attributes:
        address: the machine's.
        state: shared with the process that passes packets on: whether those from the machine, and to it, arrive (1 or
            0), and the seconds that each takes.
        ends: tunnels: the center's end, and the machine's.
    """

    name: str
    address: str
    state: Any = field(default_factory=lambda: multiprocessing.RawArray("d", (1, 1, 0)))
    ends: tuple[int, int] = (-1, -1)

    def command(self, *words: str) -> list[str]:
        """A command that runs on the machine."""
        return ["ip", "netns", "exec", self.name, *words]

    def enter(self) -> None:
        """Put the calling thread, and the processes and connections that it makes from now on, on the machine."""
        with Path(f"/run/netns/{self.name}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def cut(self, up: bool = True, down: bool = True) -> None:
        """Drop packets from the machine, to it, or both."""
        self.state[:] = (not up, not down, 0)

    def delay(self, seconds: float) -> None:
        self.state[:] = (1, 1, seconds)

    def mend(self) -> None:
        self.state[:] = (1, 1, 0)


@contextlib.contextmanager
def machines(count: int) -> Iterator[tuple[Line, list[Line]]]:
    """A center and `count` machines, each at the end of a line of its own. The center's line only names it."""
    prefix = f"octavo-{os.getpid()}"
    center = Line(f"{prefix}-c", "")
    lines = [Line(f"{prefix}-{i}", f"10.213.{i}.2") for i in range(count)]
    relay = multiprocessing.get_context("fork").Process(target=_relay, args=(lines,), daemon=True)
    try:
        for namespace in (center.name, *(line.name for line in lines)):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        for i, line in enumerate(lines):
            center_end, machine_end = f"10.213.{i}.1", line.address
            line.ends = (_tunnel(center, f"line{i}"), _tunnel(line, "line"))
            for namespace, device, own, other in (
                (center.name, f"line{i}", center_end, machine_end),
                (line.name, "line", machine_end, center_end),
            ):
                ip("-n", namespace, "addr", "add", own, "peer", other, "dev", device)
                ip("-n", namespace, "link", "set", device, "up")
        relay.start()
        yield center, lines
    finally:
        if relay.pid is not None:
            relay.terminate()
            relay.join()
        for line in lines:
            for end in line.ends:
                if end >= 0:
                    os.close(end)
        for namespace in (center.name, *(line.name for line in lines)):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _tunnel(machine: Line, device: str) -> int:
    """A tunnel's file descriptor; its network device is on the machine."""
    made: list[int] = []

    def make() -> None:
        machine.enter()
        tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(tunnel, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TUN_WITHOUT_HEADER))
        made.append(tunnel)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def _relay(lines: list[Line]) -> None:
    """Pass packets on until this process is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    poll = select.poll()
    owners: dict[int, tuple[Line, bool]] = {}
    number = 0
    for line in lines:
        for end, is_up in ((line.ends[0], False), (line.ends[1], True)):
            poll.register(end, select.POLLIN)
            owners[end] = line, is_up
    waiting: list[tuple[float, int, int, bytes]] = []  # time, number, to, packet
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, to, packet = heapq.heappop(waiting)
            _write(to, packet)
        pause = waiting[0][0] - now if waiting else 1.0
        for end, _ in poll.poll(max(0, pause * 1000)):
            line, is_up = owners[end]
            try:
                packet = os.read(end, _PACKET)
            except OSError:
                continue
            up, down, delay = line.state
            if not (up if is_up else down):
                continue
            to = line.ends[0] if is_up else line.ends[1]
            if delay:
                number += 1
                heapq.heappush(waiting, (time.monotonic() + delay, number, to, packet))
            else:
                _write(to, packet)


def _write(to: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # a full queue loses packets, as lines do
        os.write(to, packet)

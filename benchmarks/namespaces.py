"""Network namespaces, each with a network of its own: the machines of tests and benchmarks (command ip)."""

import os
import subprocess


def missing() -> str | None:
    """Why this machine cannot have network namespaces; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"octavo-try-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    except OSError:
        return "there is no command ip (package iproute2)"
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)

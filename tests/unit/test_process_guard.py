"""What a process does to keep its memory to itself, in processes of their own; and that others do not pay for it."""

import os
import shutil
import subprocess
import sys

import pytest


def run(program: str, *wrapper: str) -> str:
    done = subprocess.run([*wrapper, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_core_dumps_and_no_debuggers() -> None:
    program = """
import ctypes, resource
from octavo.process_guard import hide_memory
hide_memory()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))
"""
    assert run(program).strip() == "0 (0, 0)"


def test_memory_is_locked_where_that_is_allowed() -> None:
    program = """
from octavo.process_guard import lock_memory
reason = lock_memory()
memory = bytearray(1 << 20)
[locked] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmLck")]
assert (int(locked) > 1024) == (reason is None), (locked, reason)
print(reason)
"""
    run(program)
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root with util-linux's setpriv can take a right away from a process")
    limited = ("sh", "-c", 'ulimit -l 64; exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock "$@"', "sh")
    assert "the limit is 64 KiB" in run(program, *limited)


def test_a_server_without_secrets_imports_nothing_for_them() -> None:
    program = """
import sys
import octavo.server.app, octavo.engine.loading, octavo.frontend.links.engine_main
names = ("pyrage", "cryptography", "octavo.server.audit", "octavo.formats.encrypted_model")
print([name for name in names if name in sys.modules])
"""
    assert run(program).strip() == "[]"

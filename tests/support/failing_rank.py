"""A rank on a GPU, one of whose functions fails: run it in place of octavo.backends.cuda.rank_main.

FAILING_FUNCTION names the function, in that module. With FAILING_BY=kill, it kills the process instead of raising.
"""

import operator
import os
import signal
import sys
from typing import Any

from octavo.backends.cuda import rank_main
from octavo.errors import OutOfMemory


def fail(*_: Any, **__: Any) -> None:
    if os.environ.get("FAILING_BY") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OutOfMemory("this does not fit")


if __name__ == "__main__":
    place, _, name = os.environ["FAILING_FUNCTION"].rpartition(".")
    setattr(operator.attrgetter(place)(rank_main) if place else rank_main, name, fail)
    rank_main.main(*map(int, sys.argv[1:]))

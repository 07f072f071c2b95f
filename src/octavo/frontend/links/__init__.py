"""Links: the ways a frontend reaches an engine. Every link carries the same messages.

messages.py lists the messages, engine_loop.py is what an engine does with them. thread.py runs the loop in a thread of
this process, process.py in a process of its own, whose main program is engine_main.py.
"""

from .link import Link
from .process import ProcessLink
from .thread import ThreadLink

__all__ = ["Link", "ProcessLink", "ThreadLink"]

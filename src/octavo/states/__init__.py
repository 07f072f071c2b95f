"""KV states: handles by which a user keeps a conversation and continues it later.

handle.py has the handle of a user, book.py the list of all states and their owners, file.py the format of saved states,
and jobs.py the engine's part in saving and loading them.
"""

from .book import StateBook
from .handle import KVState

__all__ = ["KVState", "StateBook"]

"""KV states: handles by which a user keeps a conversation and continues it later.

handle.py is what a user holds, book.py which states exist and who owns them, file.py a state on disk, and jobs.py the
engine's part in saving and loading files.
"""

from .book import StateBook
from .handle import KVState

__all__ = ["KVState", "StateBook"]

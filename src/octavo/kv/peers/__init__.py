"""Pages from engine to engine: each serves those of its pool, and fetches those that the frontend says others have.

access.py: what an engine needs for it. serving.py: the thread that serves. fetching.py: the side that asks.

A question is a number, which its answers repeat, and the keys of pages, at most MAX_KEYS. An answer is the number and
the value of a page (see octavo.kv.store.page_values), one for each key, in order. The value of a page that is not there
any more is empty, and the last. Both sides prove that they have the secret of the fleet, and what they send is
encrypted (octavo.curve).
"""

NUMBER_BYTES = 8
MAX_KEYS = 32

"""PeerAccess: what an engine needs to serve pages to other engines, and to fetch theirs."""

import msgspec


class PeerAccess(msgspec.Struct, frozen=True):
    """Where an engine serves its pages, and the secret that all engines of the fleet share. Its `repr` hides it.

    Attributes:
        host: the address of this machine on which it listens, at a port that is free, such as 127.0.0.1.
        secret: 32 bytes.
    """

    host: str
    secret: bytes

    def __repr__(self) -> str:
        return f"PeerAccess({self.host!r}, ***)"

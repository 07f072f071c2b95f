"""Host check: which names a request may give the server.

A web page can make a browser connect to this machine under a name of its own (DNS rebinding), and then reads the
answers as if they were its own. The header field Host has that name. A page cannot make a browser send an address,
or localhost, for another server than its own.
"""

import ipaddress
from collections.abc import Collection
from functools import lru_cache

from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError

LOCAL_NAME = "localhost"
MAX_SHOWN = 80  # characters of a refused name in the error

Headers = list[tuple[bytes, bytes]]


class HostCheck:
    """Refuses requests for other names than `allowed`, localhost and addresses.

    Args:
        allowed: names in lower case; *.example.org allows those below example.org.
    """

    def __init__(self, allowed: Collection[str]):
        self._names = frozenset(name for name in allowed if not name.startswith("*."))
        self._ends = (".localhost", *(name[1:] for name in allowed if name.startswith("*.")))
        self._is_allowed = lru_cache(maxsize=1024)(self._allows)

    def check(self, headers: Headers) -> None:
        """Raise ApiError 403 if a request is for another name. Browsers always send one, so none is needed."""
        for name, value in headers:
            if name == b"host" and not self._is_allowed(value):
                shown = value.decode("latin-1")[:MAX_SHOWN]
                message = f"this server does not serve the host {shown!r}: start it with --allowed-hosts to add names"
                raise ApiError(403, message, code="host_not_allowed")

    def _allows(self, value: bytes) -> bool:
        host = value.decode("latin-1").strip().lower()
        if host.startswith("["):
            return _is_address(host[1:].partition("]")[0])
        name = host.partition(":")[0].removesuffix(".")
        return name == LOCAL_NAME or name in self._names or name.endswith(self._ends) or _is_address(name)


def host_check(config: ServerConfig) -> HostCheck | None:
    """Return the check of a server; None if it serves any name.

    By default, names are checked where only this machine can connect and no key is needed: elsewhere, whoever wants to
    attack can connect without a browser.
    """
    if config.allowed_hosts is not None:
        return None if "*" in config.allowed_names else HostCheck(config.allowed_names)
    is_local = config.host == LOCAL_NAME or (_is_address(config.host) and ipaddress.ip_address(config.host).is_loopback)
    return HostCheck(()) if is_local and config.uds is None and not config.has_keys else None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True

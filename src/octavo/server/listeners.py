"""The sockets on which a server accepts connections: on addresses of the network, or a Unix socket."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from octavo.errors import ConfigError

BACKLOG = 4096  # connections that may wait to be accepted; the kernel's somaxconn may allow fewer
ALL_ADDRESSES = {"": ("::", "0.0.0.0"), "::": ("::", "0.0.0.0")}
OWNER_AND_GROUP = 0o117  # the umask under which a Unix socket is made


def listen(host: str, port: int) -> list[socket.socket]:
    """Return one listening socket for every address of `host`, all on the same port. Port 0 takes a free port.

    An empty host and :: stand for all addresses of IPv4 and IPv6; a family that the machine lacks is left out. Clients
    that connect before the engine is ready wait. Raises ConfigError if an address is unknown or taken.
    """
    addresses = _addresses(host, port)
    listeners: list[socket.socket] = []
    failure: OSError | None = None
    for family, address in addresses:
        bound = (address[0], listeners[0].getsockname()[1], *address[2:]) if listeners else address
        try:
            listeners.append(socket.create_server(bound, family=family, backlog=BACKLOG))
        except OSError as error:
            failure = error
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                break
    if listeners and (failure is None or failure.errno != errno.EADDRINUSE):
        return listeners
    for listener in listeners:
        listener.close()
    assert failure is not None
    if failure.errno == errno.EADDRINUSE:
        where = f"port {port} on {host or 'all addresses'}"
        raise ConfigError(f"{where} is in use: stop the program that uses it, or choose another --port") from None
    raise ConfigError(f"cannot listen on {host} port {port}: {failure.strerror or failure}") from None


@contextlib.contextmanager
def unix_listener(path: str) -> Iterator[socket.socket]:
    """Listen on a Unix socket, which the user and the group of this process may use, and remove it at the end.

    A socket that an ended server has left is replaced. Raises ConfigError if `path` is something else or in use.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        _remove_stale(path)
        mask = os.umask(OWNER_AND_GROUP)
        try:
            listener.bind(path)
        except OSError as error:
            raise ConfigError(f"cannot listen on the Unix socket {path}: {error.strerror or error}") from None
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
        own = _identity(path)
        try:
            yield listener
        finally:
            if _identity(path) == own:  # otherwise another server has replaced it
                Path(path).unlink()


def _remove_stale(path: str) -> None:
    """Remove a Unix socket on which nothing listens."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"{path} exists and is not a socket: choose another --uds")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        Path(path).unlink()
        return
    except OSError as error:
        raise ConfigError(f"cannot listen on the Unix socket {path}: {error.strerror or error}") from None
    raise ConfigError(f"the Unix socket {path} is in use: stop the program that uses it, or choose another --uds")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _addresses(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    """Return the address families and addresses of `host`, without duplicates."""
    found: dict[tuple[int, tuple[str, int]], None] = {}
    for name in ALL_ADDRESSES.get(host, (host,)):
        try:
            results = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
        found.update({(family, address): None for family, _, _, _, address in results})  # type: ignore[misc]
    return list(found)

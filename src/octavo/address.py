"""Addresses of engines: tcp://host:port, whose host may be a name that stands for several engines."""

import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import ConfigError, shortened

EXAMPLE = "tcp://10.0.0.5:7000"
_FORM = re.compile(r"tcp://(?:\[([0-9a-fA-F:.%\w]+)\]|([^\s:/\[\]@]+)):(\d{1,5})")
_ANY = ("*", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Address:
    """A host, by name or by number, and a port."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Address":
        """Return the address that a URL names. Raises ConfigError."""
        form = _FORM.fullmatch(url.strip())
        if form is None or not 0 < int(form[3]) < 65536:
            raise ConfigError(f"{shortened(repr(url))} is no address of an engine; give one such as {EXAMPLE}")
        return cls(form[1] or form[2], int(form[3]))

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    @property
    def is_any(self) -> bool:
        """Return whether it stands for all addresses of this machine, to listen on."""
        return self.host in _ANY

    def resolved(self) -> list["Address"]:
        """Return the address of each engine that it stands for, by number. Raises OSError if the name is unknown.

        If a name has numbers of IPv4 and of IPv6, they are taken for the same machines, and those of IPv4 are returned.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except ValueError:  # too long, or with characters that no name has
            raise OSError(0, "no valid name of a host") from None
        family = min(entry[0] for entry in found)
        return sorted({Address(str(entry[4][0]), self.port) for entry in found if entry[0] == family}, key=str)

    @property
    def is_number(self) -> bool:
        """Return whether the host is a number, which always stands for the same engine."""
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in self.host else socket.AF_INET, self.host)
        except (OSError, ValueError):
            return False
        return True

    @property
    def is_local(self) -> bool:
        """Return whether it is a number to which only this machine can connect."""
        return self.host == "::1" or self.host.startswith("127.")


def addresses(urls: Iterable[str]) -> list[Address]:
    """Return the addresses of URLs, without duplicates. Raises ConfigError."""
    return list(dict.fromkeys(Address.of(url) for url in urls))

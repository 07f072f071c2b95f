"""Where a Redis is: the address and the credentials in a URL."""

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from octavo.errors import ConfigError
from octavo.secret import hide_password

_FORM = "redis://[user:password@]host:6379[/database], rediss://… or unix://[user:password@]/path"
_OPTIONS = {"redis": {"db"}, "rediss": {"db", "ssl_ca_certs", "ssl_cert_reqs"}, "unix": {"db"}}
_CHECKS = ("required", "none")  # values of ssl_cert_reqs


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """The parts of a URL.

    Attributes:
        host, port: where it listens; "" and 0 for a Unix socket.
        path: the path of its Unix socket, or "".
        ca_certs: file of the authorities that may sign its certificate; None for those of the system.
        checks_certificate: whether its certificate must be valid for `host`.
        shown: the URL without its password.
    """

    host: str = ""
    port: int = 0
    path: str = ""
    uses_tls: bool = False
    ca_certs: str | None = None
    checks_certificate: bool = True
    username: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    shown: str = ""

    @classmethod
    def parse(cls, url: str) -> "RedisAddress":
        """Return the address in a URL. Raises ConfigError if it is malformed."""
        shown = hide_password(url)
        try:
            parts = urlsplit(url)
            options = parse_qs(parts.query, strict_parsing=bool(parts.query))
            port = parts.port
        except ValueError as error:
            # The error's text may have a part of the password.
            reason = f" ({error})" if shown == url else "; write / in a password as %2F"
            raise ConfigError(f"kv_store must be {_FORM}, not {shown}{reason}") from None
        if unknown := set(options) - _OPTIONS.get(parts.scheme, set()):
            raise ConfigError(f"kv_store: {shown} has the unknown option {unknown.pop()}")
        is_unix = parts.scheme == "unix"
        database = options.get("db", [None])[0] or ("0" if is_unix else parts.path.strip("/") or "0")
        if parts.scheme not in _OPTIONS or not (parts.path if is_unix else parts.hostname):
            raise ConfigError(f"kv_store must be {_FORM}, not {shown}")
        if not re.fullmatch(r"\d{1,5}", database):
            raise ConfigError(f"kv_store: the database of {shown} must be a number")
        if (check := options.get("ssl_cert_reqs", ["required"])[0]) not in _CHECKS:
            raise ConfigError(f"kv_store: ssl_cert_reqs must be {' or '.join(_CHECKS)}, not {check}")
        return cls(
            host="" if is_unix else parts.hostname or "",
            port=0 if is_unix else port or 6379,
            path=parts.path if is_unix else "",
            uses_tls=parts.scheme == "rediss",
            ca_certs=options.get("ssl_ca_certs", [None])[0],
            checks_certificate=check == "required",
            username=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            database=int(database),
            shown=shown,
        )

"""ServerConfig: every setting of the HTTP server, defined once."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import ConfigError

ACCESS_LOGS = ("text", "json", "none")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP server. Sizes are in bytes, times in seconds.

    Raises ConfigError, one line, for a value that cannot work.
    """

    host: str = _setting(
        "127.0.0.1", "Address to listen on: 0.0.0.0 for all of IPv4, :: or an empty string for IPv4 and IPv6."
    )
    port: int = _setting(8000, "Port to listen on; 0 takes a free one.")
    access_log: str = _setting("text", "One line on standard output for each request: text, json or none.")
    access_log_prompts: bool = _setting(False, "Include prompts and messages in the access log.")
    cors_origins: str | None = _setting(
        None, "Web origins whose pages may call the server, separated by commas, or * for all. None by default."
    )
    drain_timeout: float = _setting(
        60.0, "Seconds that running requests have to finish after SIGTERM, SIGHUP or Ctrl-C."
    )
    first_byte_timeout: float = _setting(30.0, "Seconds that a new connection may stay silent.")
    header_timeout: float = _setting(15.0, "Seconds in which the header of a request must arrive.")
    body_timeout: float = _setting(
        30.0, "Seconds in which the body of a request must arrive, plus one for every 64 KiB received."
    )
    idle_timeout: float = _setting(75.0, "Seconds that a connection is kept open between two requests.")
    send_timeout: float = _setting(60.0, "Seconds after which a client that does not read its response is cut off.")
    max_connections: int = _setting(
        8192, "Open connections. Beyond them the longest idle one is closed, or else new ones are answered 503."
    )
    max_header_bytes: int = _setting(65_536, "Bytes in the header of a request; longer ones are answered 431.")
    max_header_count: int = _setting(128, "Fields in the header of a request; more are answered 431.")
    max_body_bytes: int = _setting(16 * 2**20, "Bytes in the body of a request; longer ones are answered 413.")
    max_pending_body_bytes: int = _setting(
        128 * 2**20, "Bytes of all bodies that are still arriving; requests beyond them are answered 503."
    )
    max_json_values: int = _setting(
        200_000, "Values in a JSON body, a key counted as four, estimated from its punctuation; more are answered 413."
    )
    max_messages: int = _setting(2048, "Messages in a chat.")
    max_content_parts: int = _setting(4096, "Content parts in all messages of a chat together.")
    max_completions: int = _setting(1024, "Completions that one request may ask for: prompts times n.")
    max_stop_length: int = _setting(1024, "Characters in a stop string.")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if setting.name == "port":
                self._check(isinstance(value, int) and 0 <= value < 65536, "port", "from 0 to 65535")
            elif setting.name.startswith("max_"):
                whole = isinstance(value, int) and not isinstance(value, bool)
                self._check(whole and value >= 1, setting.name, "an integer of at least 1")
            elif setting.name.endswith("_timeout"):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                least = 0 if setting.name == "drain_timeout" else math.ulp(0)
                self._check(number and least <= value < math.inf, setting.name, "a positive number of seconds")
        self._check(self.access_log in ACCESS_LOGS, "access_log", "text, json or none")

    @property
    def allowed_origins(self) -> frozenset[str]:
        """The web origins of `cors_origins`; {"*"} for all."""
        return frozenset(filter(None, (origin.strip().rstrip("/") for origin in (self.cors_origins or "").split(","))))

    def _check(self, ok: bool, name: str, what: str) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {what}, not {getattr(self, name)!r}")

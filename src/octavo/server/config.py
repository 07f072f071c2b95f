"""ServerConfig: every setting of the HTTP server, defined once."""

import math
import re
from dataclasses import dataclass

from octavo.secret import SOURCES
from octavo.settings import Rule, Settings, Size, at_least, one_of, positive, setting

_PORT = Rule("from 0 to 65535", lambda value: 0 <= value < 65536)
_NOT_NEGATIVE = Rule("a number of seconds, 0 or more", lambda value: 0 <= value < math.inf)
_CERT_REQS = Rule("0, 1 or 2", lambda value: value in (0, 1, 2))
_KEY = Rule(
    "printable ASCII without spaces", lambda value: value.isascii() and value.isprintable() and " " not in value
)


def _is_collector(url: str) -> bool:
    return re.match("(https?|grpc)://[^/]", url) is not None


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Settings):
    """Settings of the HTTP server. Sizes are in bytes, times in seconds.

    Raises:
        ConfigError: For an invalid value. The message is one line that names the setting and the valid values.
    """

    host: str = setting(
        "127.0.0.1", "Address to listen on; 0.0.0.0: all IPv4 addresses; :: or an empty string: all IPv4 and IPv6 ones."
    )
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", _PORT)
    uds: str | None = setting(
        None, "Path of a Unix socket to listen on, in place of host and port. Its user and group may connect."
    )
    allowed_hosts: str | None = setting(
        None,
        "Names of this server, separated by commas, or * for any; requests for others (Host) are answered 403. "
        "localhost and addresses are always served. By default, any, except without keys on a loopback address.",
    )
    ssl_certfile: str | None = setting(None, "Certificate and its chain in PEM format: serves HTTPS (docs/deploy.md).")
    ssl_keyfile: str | None = setting(None, "Key of ssl_certfile in PEM format; by default, in the same file.")
    ssl_keyfile_password: str | None = setting(None, "Password of the key, if it is encrypted.")
    ssl_ca_certs: str | None = setting(None, "Certificates in PEM format of who may sign the certificates of clients.")
    ssl_cert_reqs: int = setting(
        0, "Certificates of clients: 0: none are asked for, 1: may be given, 2: must be given.", _CERT_REQS
    )
    access_log: str = setting(
        "text",
        "Format of the access log, one line per request on standard output: text, json or none.",
        one_of("text", "json", "none"),
    )
    access_log_prompts: bool = setting(False, "Include prompts and messages in the access log.")
    audit_log: str | None = setting(
        None, "File for the audit log: who asked what and when, as hashes, in lines that cannot be changed unnoticed."
    )
    audit_key: str | None = setting(None, f"Key of the audit log, 64 hexadecimal digits: {SOURCES} (docs/secrets.md).")
    enable_metrics: bool = setting(False, "Serve metrics for Prometheus at GET /metrics (docs/metrics.md).")
    page: bool = setting(True, "Serve a page for browsers at /: chat, live view and models (docs/page.md).")
    otlp_endpoint: str | None = setting(
        None,
        "Address of an OpenTelemetry collector for a span of each request, such as http://localhost:4318 "
        "(docs/tracing.md).",
        Rule("an address such as http://localhost:4318 or grpc://localhost:4317", _is_collector),
    )
    models: str | None = setting(
        None, "YAML file of several models with their settings, aliases and splits (docs/fleet.md)."
    )
    memory: Size | None = setting(
        None,
        "Memory for several models together; idle ones are unloaded for others. By default, the free memory at start, "
        "or what the container allows.",
    )
    data_dir: str | None = setting(
        None,
        "Folder for what must survive a restart: files and batches, whose routes need it, and stored responses, which "
        "are in memory without it.",
    )
    api_key: list[str] | None = setting(
        None,
        "Keys of clients, separated by commas: requests without one of them are answered 401. For keys with names and "
        "limits, see keys.",
        Rule(_KEY.what, lambda keys: bool(keys) and all(map(_KEY.holds, keys))),
    )
    keys: str | None = setting(None, "YAML file of API keys with owners and limits, see octavo keys (docs/keys.md).")
    rate_limit_mode: str = setting(
        "refuse",
        "What happens to a request over its key's rate: refuse answers 429, queue lets it wait, within its timeout.",
        one_of("refuse", "queue"),
    )
    rate_limit_store: str | None = setting(
        None,
        "URL of the Redis in which several servers count the limits of keys together, such as redis://host:6379/0. "
        "Without it, each server counts for itself, and in data_dir across restarts.",
        Rule("a URL such as redis://host:6379/0", lambda url: url.startswith(("redis://", "rediss://", "unix://"))),
    )
    admin_key: str | None = setting(
        None,
        "Key for /v1/admin, whose routes load, unload, swap and scale models, and, on a server with API keys, for "
        "/stats; without a key, they are refused.",
        _KEY,
    )
    cors_origins: str | None = setting(
        None, "Web origins whose pages may call the server, separated by commas, or * for all. None by default."
    )
    drain_timeout: float = setting(
        60.0, "Seconds that running requests may take to finish after SIGTERM, SIGHUP or Ctrl-C.", _NOT_NEGATIVE
    )
    first_byte_timeout: float = setting(
        30.0, "Seconds until the first byte of a connection must arrive.", positive("seconds")
    )
    header_timeout: float = setting(15.0, "Seconds in which the header of a request must arrive.", positive("seconds"))
    body_timeout: float = setting(
        30.0,
        "Seconds in which the body of a request must arrive, plus one for every 64 KiB received.",
        positive("seconds"),
    )
    idle_timeout: float = setting(
        75.0, "Seconds that a connection is kept open between two requests.", positive("seconds")
    )
    send_timeout: float = setting(
        60.0, "Seconds after which a client that does not read its response is cut off.", positive("seconds")
    )
    max_connections: int = setting(
        8192,
        "Maximum number of open connections. A new one then closes the longest idle one, or is answered 503.",
        at_least(1),
    )
    max_header_bytes: Size = setting(65_536, "Maximum size of a request's header; longer ones are answered 431.")
    max_header_count: int = setting(128, "Maximum number of header fields; more are answered 431.", at_least(1))
    max_body_bytes: Size = setting(8 * 2**20, "Maximum size of a request's body; longer ones are answered 413.")
    max_pending_body_bytes: Size = setting(
        128 * 2**20, "Maximum size of all bodies that are still arriving; requests beyond it are answered 503."
    )
    max_file_bytes: Size = setting(512 * 2**20, "Maximum size of a file for /v1/files; larger ones are answered 413.")
    max_files: int = setting(
        10_000, "Maximum number of files of a tenant, results of batches included; more are answered 400.", at_least(1)
    )
    max_stored_bytes: Size = setting(
        16 * 2**30, "Maximum size of all files of a tenant, results of batches included; more are answered 400."
    )
    max_batches: int = setting(
        100, "Maximum number of batches of a tenant that have not ended; more are answered 429.", at_least(1)
    )
    max_json_values: int = setting(
        200_000,
        "Maximum number of values in a JSON body, estimated from its punctuation; a key counts as four. More are "
        "answered 413.",
        at_least(1),
    )
    trust_request_chat_template: bool = setting(
        False, "Let requests bring their own chat template (chat_template), a program that is run within limits."
    )
    max_messages: int = setting(2048, "Maximum number of messages in a chat.", at_least(1))
    max_content_parts: int = setting(4096, "Maximum number of content parts in all messages of a chat.", at_least(1))
    max_completions: int = setting(1024, "Maximum number of completions per request: prompts times n.", at_least(1))
    max_stop_length: int = setting(1024, "Maximum number of characters in a stop string.", at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_ca_certs"):
                self.need(getattr(self, name) is None, name, "unset without ssl_certfile")
        asked = self.ssl_cert_reqs > 0
        self.need(asked or self.ssl_ca_certs is None, "ssl_cert_reqs", "1 or 2 with ssl_ca_certs (2: no other clients)")
        self.need(not asked or self.ssl_ca_certs is not None, "ssl_ca_certs", "a file, with ssl_cert_reqs 1 or 2")
        self.need(self.audit_log is None or self.audit_key is not None, "audit_key", "given with audit_log")

    @property
    def has_keys(self) -> bool:
        """Return whether requests need an API key."""
        return self.api_key is not None or self.keys is not None

    @property
    def allowed_origins(self) -> frozenset[str]:
        """Return the web origins in `cors_origins`; {"*"} stands for all."""
        return frozenset(filter(None, (origin.strip().rstrip("/") for origin in (self.cors_origins or "").split(","))))

    @property
    def allowed_names(self) -> frozenset[str]:
        """Return the names in `allowed_hosts`, in lower case."""
        return frozenset(filter(None, (name.strip().lower() for name in (self.allowed_hosts or "").split(","))))

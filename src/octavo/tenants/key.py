"""Key: the owner of an API key, and what the key allows. The key itself is stored as a hash only."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from octavo.errors import ConfigError
from octavo.settings import Rule, Settings, at_least, setting

PREFIX = "sk-"
SECRET_BYTES = 32  # at random; so a hash need not be slow to keep the key from being guessed
_NAME = Rule("1 to 64 printable characters of ASCII", lambda name: 1 <= len(name) <= 64 and _is_printable(name))
_TENANT = Rule("at most 256 printable characters of ASCII", lambda name: len(name) <= 256 and _is_printable(name))
_WEIGHT = Rule("from 0.000001 to 1000000", lambda weight: 1e-6 <= weight <= 1e6)
_HASH = Rule("a SHA-256 hash in hexadecimal", lambda text: len(text) == 64 and set(text) <= set("0123456789abcdef"))


def _is_printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Key(Settings):
    """An API key without its secret. None means: no limit.

    Raises:
        ConfigError: For an invalid value. The message is one line that names the field.
    """

    name: str = setting("", "Name of the key, for the operator and the access log.", _NAME)
    hash: str = setting("", "SHA-256 of the secret, in hexadecimal.", _HASH)
    tenant: str | None = setting(None, "Tenant whose requests these are; by default the key's name.", _TENANT)
    names_tenants: bool = setting(
        False, "The client names the tenant of each request itself (X-Octavo-Tenant), as a trusted proxy does."
    )
    requests_per_minute: int | None = setting(None, "Requests in any 60 seconds.", at_least(1))
    concurrent_requests: int | None = setting(None, "Requests at the same time.", at_least(1))
    tokens_per_minute: int | None = setting(
        None, "Tokens of prompts and answers, of the requests that begin in any 60 seconds.", at_least(1)
    )
    monthly_tokens: int | None = setting(None, "Tokens of prompts and answers in a calendar month (UTC).", at_least(1))
    max_new_tokens: int | None = setting(
        None, "Tokens that a completion may have; requests that want more, or set no limit, get so many.", at_least(1)
    )
    weight: float | None = setting(
        None, "Share of the machine, relative to other tenants, which have 1 (scheduling_policy: fair).", _WEIGHT
    )
    models: list[str] | None = setting(None, "Names of the models that may be used.")
    routes: list[str] | None = setting(None, "Beginnings of the paths that may be used, such as /v1/embeddings.")
    min_priority: int | None = setting(None, "Least value of `priority` that requests may have; lower ones run sooner.")
    expires: str | None = setting(
        None, "Date, or date and time, after which the key is refused.", Rule("a date in ISO 8601", _is_date)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None and self.names_tenants:
            raise ConfigError("weight does not go with names_tenants: the tenants share by tenant_weights")

    @property
    def owner(self) -> str:
        """Return the tenant of the key's requests."""
        return self.name if self.tenant is None else self.tenant

    def is_expired(self, now: float) -> bool:
        """Return whether the key is refused at `now`, in seconds of Unix time. A date without a zone is in UTC."""
        if self.expires is None:
            return False
        end = datetime.fromisoformat(self.expires)
        return now >= (end if end.tzinfo else end.replace(tzinfo=UTC)).timestamp()

    def allows_path(self, path: str) -> bool:
        """Return whether the key may be used for a route."""
        return self.routes is None or any(
            path == each or path.startswith(f"{each.rstrip('/')}/") for each in self.routes
        )

    @property
    def limits_tokens(self) -> bool:
        """Return whether there is a limit of tokens."""
        return self.tokens_per_minute is not None or self.monthly_tokens is not None

    def allows_model(self, name: str) -> bool:
        """Return whether the key may be used for a model, by the name that a request gives."""
        return self.models is None or name in self.models


def new_secret() -> str:
    """Return a new key at random, for a client."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def secret_hash(secret: str) -> str:
    """Return the hash by which a secret is stored and found."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()

"""Secrets: the identity that opens an encrypted model, and the key of KV pages on disk.

A setting names the source of a secret, never the secret itself: a file, an environment variable or a command. Secrets
are read once, in the process that the user starts, and are sent to engine processes in their first message.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from .errors import ConfigError, shortened

VARIABLES = "OCTAVO_SECRET_"  # prefix of environment variables that hold secrets
SOURCES = f"a file, env:{VARIABLES}NAME or cmd:COMMAND"
_LONGEST = 1 << 16  # bytes
_SECONDS = 60.0  # for a command
_LIKE_A_SECRET = re.compile(r"\s*(?:[0-9a-f]{32,}\s*$|age-secret-key-|-----begin)", re.IGNORECASE)


class Secrets(msgspec.Struct, frozen=True):
    """The secrets of one engine. Its `repr` hides them.

    Attributes:
        model_identity: An age identity.
        kv_key: 64 hexadecimal digits.
        nodes_key: the same, shared by the nodes of a model.
    """

    model_identity: str | None = None
    kv_key: str | None = None
    nodes_key: str | None = None

    def __repr__(self) -> str:
        return "Secrets(***)"

    def __bool__(self) -> bool:
        return any(secret is not None for secret in (self.model_identity, self.kv_key, self.nodes_key))


def read_secret(setting: str, source: str | None) -> str | None:
    """Return the secret that a setting names, without surrounding white space; None if the setting is None.

    Args:
        setting: The name of the setting, for errors.
        source: The path of a file, "env:" and the name of a variable, or "cmd:" and a command that prints the secret.

    Raises:
        ConfigError: The secret cannot be read, or it is empty.
    """
    if source is None:
        return None
    kind, _, rest = source.partition(":")
    if kind == "env":
        secret = _variable(setting, rest)
    elif kind == "cmd":
        secret = _printed(setting, rest)
    else:
        secret = _content(setting, rest if kind == "file" else source)
    if not (secret := secret.strip()):
        raise ConfigError(f"{setting}: {shortened(source)} holds nothing")
    return secret


def read_key(setting: str, source: str | None) -> str | None:
    """Return the key of 256 bits that a setting names; see `read_secret`.

    Raises:
        ConfigError: It cannot be read, or is no key. The message does not show it.
    """
    key = read_secret(setting, source)
    if key is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", key):
        raise ConfigError(
            f"{setting} holds no key: it must be 64 hexadecimal digits, as openssl rand -hex 32 prints them"
        )
    return key


def hide_password(url: str) -> str:
    """Return a URL with *** instead of its password."""
    return re.sub(r"(?<=://).*@", "***@", url)  # up to the last @: a password may contain / and @


def without_secrets(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a child process, which must not inherit secrets."""
    return {name: value for name, value in variables.items() if not name.startswith(VARIABLES)}


def _refuse_secret(setting: str, source: str) -> None:
    """Raise ConfigError if a source that does not exist looks like a secret, which must not be shown."""
    if _LIKE_A_SECRET.match(source):
        raise ConfigError(f"{setting} seems to be the secret itself; name its source: {SOURCES}") from None


def _variable(setting: str, name: str) -> str:
    if name not in os.environ:
        _refuse_secret(setting, name.removeprefix(VARIABLES))
    if not name.startswith(VARIABLES):
        raise ConfigError(
            f"{setting}: the variable must be called {VARIABLES}..., since these are hidden from other processes, "
            f"not {shortened(repr(name))}"
        )
    if name not in os.environ:
        raise ConfigError(f"{setting}: the environment has no variable {shortened(name)}")
    return os.environ[name]


def _printed(setting: str, command: str) -> str:
    """Return what a command prints. Its errors go to standard error."""
    import shlex
    import subprocess

    try:
        words = shlex.split(command)
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=_SECONDS, env=without_secrets()
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{setting}: {shortened(command)} has not ended within {_SECONDS:.0f} s") from None
    except (OSError, ValueError, IndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{setting}: cannot run {shortened(command)!r} ({reason})") from None
    if done.returncode:
        raise ConfigError(f"{setting}: {shortened(command)} failed with exit code {done.returncode}")
    return _text(setting, done.stdout)


def _content(setting: str, path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            return _text(setting, file.read(_LONGEST + 1))
    except (OSError, RuntimeError) as error:
        _refuse_secret(setting, path)
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{setting}: cannot read {shortened(path)} ({reason}); give {SOURCES}") from None


def _text(setting: str, content: bytes) -> str:
    if len(content) > _LONGEST:
        raise ConfigError(f"{setting}: a secret has at most {_LONGEST >> 10} KiB")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{setting}: the secret is not text") from None

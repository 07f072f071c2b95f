"""The format of an audit log: lines of JSON, each of which is authenticated together with the one before it.

    {"previous":"<mac of the line before>", ...,"mac":"<HMAC-SHA256 of all before this member>"}

The first line of the first file has 64 zeros as `previous`. So a line that was changed, removed, added or moved breaks
the chain, and nobody can mend it without the key. A log may consist of several files, each of which continues the one
before it.

If the server is killed in the middle of a line, that line is torn. The next one to write is then a line with event
"start", which says how many bytes the torn line has.
"""

import hmac
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

ORIGIN = "0" * 64
_MAC = re.compile(rb',"mac":"([0-9a-f]{64})"}\n')
_MAC_BYTES = len(b',"mac":""}\n') + 64


@dataclass(frozen=True)
class Keys:
    """The keys of a log, derived from that of the setting audit_key.

    Attributes:
        chain: authenticates lines.
        content: hashes prompts and answers. Without a key, whoever reads the log could guess short ones.
    """

    chain: bytes
    content: bytes

    @classmethod
    def of(cls, key: str) -> "Keys":
        """Derive the keys. `key` has 64 hexadecimal digits."""
        secret = bytes.fromhex(key)
        return cls(*(hmac.digest(secret, b"octavo audit " + purpose, "sha256") for purpose in (b"chain", b"content")))

    def __repr__(self) -> str:
        return "Keys(***)"

    def hash(self, content: str | bytes | bytearray) -> str:
        """Return the hash of a request's body, or of an answer, as it is in the log."""
        return hmac.new(self.content, content.encode() if isinstance(content, str) else content, sha256).hexdigest()


def sealed(values: dict[str, Any], previous: str, keys: Keys) -> tuple[bytes, str]:
    """Return the line of some values, and its mac, which the next line needs."""
    start = msgspec.json.encode({"previous": previous, **values})[:-1]
    mac = hmac.digest(keys.chain, start, "sha256").hex()
    return start + b',"mac":"' + mac.encode() + b'"}\n', mac


def mac_of(line: bytes, keys: Keys) -> str | None:
    """Return the mac of a whole line; None if it is not a line that was written with these keys."""
    found = _MAC.fullmatch(line[-_MAC_BYTES:])
    if found is None or not hmac.compare_digest(
        hmac.digest(keys.chain, line[:-_MAC_BYTES], "sha256").hex().encode(), found[1]
    ):
        return None
    return found[1].decode()


@dataclass
class Verdict:
    """What the files of a log show.

    Attributes:
        lines: authentic lines.
        first, last: the `previous` of the first line, and the mac of the last one.
        torn: lines that were torn when a server was killed.
        problems: what is wrong, a line each; none if the log is as it was written.
        is_closed: whether the last line is the one that a server writes when it ends.
    """

    lines: int = 0
    first: str = ORIGIN
    last: str = ORIGIN
    torn: int = 0
    problems: list[str] = field(default_factory=list)
    is_closed: bool = False


def verify(files: Iterable[Path], keys: Keys) -> Verdict:
    """Check the files of a log, the oldest first. Raises OSError."""
    verdict = Verdict()
    torn: int | None = None  # bytes of the torn line before this one
    is_known = True  # whether the line before this one is authentic
    for place, line in _lines(files):
        mac = mac_of(line if line.endswith(b"\n") else line + b"\n", keys)
        if mac is None:
            if torn is not None or not _is_torn(line):
                verdict.problems.append(f"{place}: this line was changed, or written with another key")
                torn, is_known = None, False
            else:
                torn = len(line.rstrip(b"\n"))
                verdict.torn += 1
            continue
        values = json.loads(line)
        if torn is not None and (values.get("event") != "start" or values.get("torn") != torn):
            verdict.problems.append(f"{place}: the line before it was cut")
        elif torn is None and values.get("torn"):
            verdict.problems.append(f"{place}: a torn line before it is missing")
        if not verdict.lines:
            verdict.first = values["previous"]
        elif is_known and values["previous"] != verdict.last:
            verdict.problems.append(f"{place}: lines before it are missing, or it was moved here")
        torn, is_known = None, True
        verdict.lines += 1
        verdict.last, verdict.is_closed = mac, values.get("event") == "stop"
    return verdict


def _is_torn(line: bytes) -> bool:
    """Return whether a line may be the beginning of one whose writing was cut short."""
    text, start = line.rstrip(b"\n"), b'{"previous":"'
    is_whole = _MAC.fullmatch(text[-_MAC_BYTES + 1 :] + b"\n") is not None
    return bool(text) and not is_whole and (text.startswith(start) or start.startswith(text))


def _lines(files: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", line

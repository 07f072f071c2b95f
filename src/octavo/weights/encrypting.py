"""Encrypt a model's files by age, as formats/encrypted_model.py reads them."""

import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import msgspec

from octavo.errors import ConfigError, shortened
from octavo.formats.encrypted_model import SUFFIX, EncryptedFile, Manifest, read_age_header
from octavo.formats.files import MANIFEST, open_regular
from octavo.formats.gguf import read_header

from .checkpoint import open_checkpoint
from .fingerprint import fingerprint

_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")


def encrypt_model(
    path: Path, folder: Path, recipients: Sequence[str], progress: Callable[[int, int], None]
) -> tuple[int, list[str]]:
    """Write the encrypted files of a model, and their manifest, into a folder.

    Args:
        path: A directory or a .gguf file.
        folder: An existing directory.
        recipients: age recipients (age1...) and SSH public keys (ssh-ed25519 ..., ssh-rsa ...).
        progress: Called as progress(bytes encrypted, total bytes).

    Returns:
        The size of the plaintext in bytes, and the names of files that no model needs and that were left out.

    Raises:
        ConfigError: A recipient is not one.
        ModelNotFound, DamagedWeights, UnsupportedModel: The model cannot be loaded.
        OSError: A file cannot be written.
    """
    keys = [_recipient(text) for text in recipients]
    digest = fingerprint(open_checkpoint(path))
    root = path if path.is_dir() else path.parent
    files = sorted(_files(path))
    total, done = sum(file.stat().st_size for file in files), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    entries = {}
    for file in files:
        name = file.relative_to(root).as_posix()
        with open_regular(file) as source:
            header = _encrypt(_Counted(source, count), folder / f"{name}{SUFFIX}", keys)
        entries[name] = EncryptedFile(file.stat().st_size, _head(file), header)
    manifest = msgspec.json.encode(Manifest(entries, "" if path.is_dir() else path.name, digest))
    _encrypt(BytesIO(manifest), folder / MANIFEST, keys)
    others = [file.name for file in root.iterdir() if file.is_file() and file not in files] if path.is_dir() else []
    return total, sorted(others)


def _files(path: Path) -> Iterator[Path]:
    """Yield the files that Octavo, or a tokenizer of another program, reads."""
    if not path.is_dir():
        yield path
        return
    for pattern in _WANTED:
        yield from (file for file in path.glob(pattern) if file.is_file())


def _head(file: Path) -> int:
    """Return how many bytes of a file precede the weights."""
    if file.suffix == ".gguf":
        return min((tensor.start for tensor in read_header(file).tensors), default=file.stat().st_size)
    if file.suffix == ".safetensors":
        with file.open("rb") as opened:
            return 8 + int.from_bytes(opened.read(8), "little")
    return file.stat().st_size


def _encrypt(source: "IO[bytes] | _Counted", target: Path, recipients: Sequence[Any]) -> str:
    """Encrypt a file. Return the SHA-256 of the age file's header in hexadecimal digits. Raises OSError."""
    import pyrage

    target.parent.mkdir(exist_ok=True)
    with target.open("w+b") as file:
        pyrage.encrypt_io(source, file, recipients)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return sha256(read_age_header(file)).hexdigest()


def _recipient(text: str) -> Any:
    """Parse a recipient. Raises ConfigError."""
    try:
        import pyrage
    except ImportError:
        raise ConfigError("octavo encrypt needs pyrage: pip install 'octavo[secrets]'") from None
    try:
        kind = pyrage.ssh.Recipient if text.startswith("ssh-") else pyrage.x25519.Recipient
        return kind.from_str(text.strip())
    except pyrage.RecipientError as error:
        raise ConfigError(
            f"{shortened(repr(text))} is no recipient ({error}): give a public key age1..., which age-keygen prints, "
            "or the content of a .pub file of SSH"
        ) from None


class _Counted:
    """A file object that reports how much is read."""

    def __init__(self, file: IO[bytes], count: Callable[[int], None]):
        self._file, self._count = file, count

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._count(len(piece))
        return piece

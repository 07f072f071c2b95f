"""Models encrypted by age (https://age-encryption.org/v1), as `octavo encrypt` writes them.

An encrypted model is a folder. Each of its files is the age encryption NAME.age of a file of the model, and
octavo-model.age is that of the manifest, which lists them. Plaintext exists only in memory.

age authenticates every 64 KiB of a file, their order and the end of the file, with a key of this file alone, which its
header holds. The manifest has the hash of each header. So a file that was changed, cut, or replaced by another one,
even by one that was encrypted for the same recipients, is refused.
"""

import ctypes
import fnmatch
import io
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from octavo.errors import ConfigError, DamagedWeights, ModelNotFound, shortened

from .files import MANIFEST, open_regular

if TYPE_CHECKING:
    import pyrage

SUFFIX = ".age"
_FORMAT = 1
_LONGEST_HEADER, _LONGEST_MANIFEST = 1 << 20, 32 << 20  # bytes
_HEADER_END = b"\n--- "  # begins the last line of an age file's header
_PUNCH_HOLE = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


class EncryptedFile(msgspec.Struct, frozen=True):
    """What the manifest says of one file.

    Attributes:
        size: Bytes of the plaintext.
        head: How many of them precede the weights, and are decrypted when the file is mapped.
        header: SHA-256 of the header of the age file, in hexadecimal digits.
    """

    size: int
    head: int
    header: str


class Manifest(msgspec.Struct, frozen=True):
    """The list of a model's files.

    Attributes:
        files: By name; "/" separates folders.
        gguf: The name of the model's .gguf file, or "" if the model is a directory.
        fingerprint: The fingerprint of the model's weights.
    """

    files: dict[str, EncryptedFile]
    gguf: str
    fingerprint: str
    format: int = _FORMAT


class EncryptedModel:
    """An encrypted model, whose manifest has been read.

    Args:
        folder: The folder that `octavo encrypt` has written.
        identity: An age identity, the content of a file of them, or an SSH private key without a passphrase.

    Raises:
        ConfigError: There is no usable identity.
        DamagedWeights: The manifest was changed, or it is encrypted for other identities.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder = folder
        self._identities = _identities(identity)
        self._maps: list[EncryptedMap] = []
        content = io.BytesIO()
        self._decrypt(folder / MANIFEST, None, content.write, _LONGEST_MANIFEST)
        try:
            self.manifest = msgspec.json.decode(content.getvalue(), type=Manifest)
        except msgspec.DecodeError:
            raise DamagedWeights(f"{folder} was not written by this version of octavo encrypt") from None
        if self.manifest.format != _FORMAT:
            raise DamagedWeights(f"{folder} has format {self.manifest.format}, but this version reads {_FORMAT}")

    @property
    def files(self) -> dict[str, EncryptedFile]:
        return self.manifest.files

    def decrypt(self, name: str, write: Callable[[bytes], object], limit: int | None = None) -> None:
        """Decrypt a file, and pass its plaintext to `write`, a piece at a time.

        Each piece is authentic. That the file is complete is certain when this returns.

        Args:
            limit: Number of bytes after which to stop; the whole file by default.

        Raises:
            ModelNotFound: The file is missing or cannot be read.
            DamagedWeights: The file was changed.
        """
        entry = self.files[name]
        self._decrypt(self.folder / f"{name}{SUFFIX}", entry.header, write, entry.size if limit is None else limit)

    def map(self, name: str) -> "EncryptedMap":
        """Return the file `name` in memory, to be decrypted when it is read."""
        self._maps.append(mapped := EncryptedMap(self, name))
        return mapped

    def verify(self) -> None:
        """Wait until every file whose decryption has begun is known to be complete. Raises DamagedWeights."""
        for mapped in self._maps:
            mapped.verify()
        self._maps.clear()

    def _decrypt(self, path: Path, header: str | None, write: Callable[[bytes], object], size: int) -> None:
        """Decrypt at most `size` bytes of a file. Raises ModelNotFound and DamagedWeights."""
        import pyrage

        with open_regular(path) as file:
            start = read_age_header(file)
            if header is not None and sha256(start).hexdigest() != header:
                raise _changed(path)
            sink = _Sink(write, size)
            try:
                pyrage.decrypt_io(_Chained(start, file), sink, self._identities)
            except _Enough:
                return
            except pyrage.DecryptError:
                if header is not None:
                    raise _changed(path) from None
                raise DamagedWeights(
                    f"{path} cannot be opened with this identity: give one of those that it was encrypted for "
                    "(or the file was changed)"
                ) from None
            except OSError as error:
                if error.errno is not None:
                    raise ModelNotFound(f"cannot read {shortened(path)}: {error.strerror}") from None
                raise _changed(path) from None


class EncryptedPath:
    """A path in an encrypted model, used as a Path is (compare zipfile.Path)."""

    def __init__(self, model: EncryptedModel, name: str = ""):
        self.model = model
        self._name = name

    def __truediv__(self, name: str) -> "EncryptedPath":
        return EncryptedPath(self.model, f"{self._name}/{name}" if self._name else name)

    def __str__(self) -> str:
        return str(self.model.folder / self._name)

    @property
    def name(self) -> str:
        return self._name.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self._name).suffix

    def exists(self) -> bool:
        return self._name in self.model.files or self.is_dir()

    def is_dir(self) -> bool:
        return not self._name or any(name.startswith(f"{self._name}/") for name in self.model.files)

    def glob(self, pattern: str) -> Iterator["EncryptedPath"]:
        """Yield the files in this directory whose names match."""
        prefix = f"{self._name}/" if self._name else ""
        for name in self.model.files:
            rest = name.removeprefix(prefix)
            if name.startswith(prefix) and "/" not in rest and fnmatch.fnmatchcase(rest, pattern):
                yield self / rest

    def read(self, limit: int) -> bytes:
        """Return the file's first `limit` bytes. Raises ModelNotFound and DamagedWeights."""
        self._require()
        content = io.BytesIO()
        whole = self.model.files[self._name].size <= limit
        self.model.decrypt(self._name, content.write, None if whole else limit)
        return content.getvalue()

    def map(self) -> "EncryptedMap":
        """Map the file. Raises ModelNotFound and DamagedWeights."""
        self._require()
        return self.model.map(self._name)

    def _require(self) -> None:
        if self._name not in self.model.files:
            raise ModelNotFound(f"{self} is missing: it is not among the files that were encrypted")


class EncryptedMap:
    """A MappedFile in anonymous memory, which a thread decrypts when its weights are first read.

    Memory is freed as tensors are released. If one is read again, the file is decrypted again.

    Raises:
        ModelNotFound, DamagedWeights
    """

    def __init__(self, model: EncryptedModel, name: str):
        entry = model.files[name]
        if not entry.size:
            raise DamagedWeights(f"{model.folder / name} is empty; encrypt the model again")
        self._model, self._name, self._size = model, name, entry.size
        self._memory = os.memfd_create("octavo-weights", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._memory)
        os.ftruncate(self._memory, entry.size)
        self.data = mmap.mmap(self._memory, entry.size)
        self.path = Path(f"/proc/self/fd/{self._memory}")
        self._changed = threading.Condition()
        self._filled = 0  # bytes that have been decrypted
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._released: set[int] = set()  # where released ranges begin
        model.decrypt(name, partial(self._fill, [0]), entry.head)
        self._filled = entry.head

    def wait(self, start: int, stop: int) -> None:
        with self._changed:
            if start in self._released:  # decrypt all again
                self._changed.wait_for(lambda: self._thread is None)
                self._released.clear()
                self._filled = 0
            if self._filled < stop and self._thread is None and self._error is None:
                self._thread = threading.Thread(target=self._run, name="octavo-decrypt", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._filled >= stop or self._error is not None)
            if self._error is not None:
                raise self._error

    def release(self, start: int, stop: int) -> None:
        with self._changed:
            self._released.add(start)
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:  # pages that are this range's alone
            offset, length = ctypes.c_long(first), ctypes.c_long(last - first)
            ctypes.CDLL(None).fallocate(self._memory, _PUNCH_HOLE, offset, length)

    def verify(self) -> None:
        """Wait until the file is known to be complete, if its decryption has begun. Raises DamagedWeights."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
            if self._error is not None:
                raise self._error

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._model.decrypt(self._name, partial(self._fill, at := [0]))
            if at[0] != self._size:
                error = _changed(self._model.folder / self._name)
        except BaseException as raised:
            error = raised
        with self._changed:
            self._thread, self._error = None, error
            self._changed.notify_all()

    def _fill(self, at: list[int], piece: bytes) -> None:
        """Write a piece of plaintext at offset at[0]."""
        stop = at[0] + len(piece)
        self.data[at[0] : stop] = piece
        at[0] = stop
        if self._thread is not None and stop > self._filled:
            with self._changed:
                self._filled = stop
                self._changed.notify_all()


class _Enough(Exception):
    """Raised to end a decryption early."""


class _Sink:
    """A file object to which pyrage writes plaintext."""

    def __init__(self, write: Callable[[bytes], object], size: int):
        self._write, self._left = write, size

    def write(self, piece: bytes) -> int:
        self._write(piece[: self._left])
        self._left -= len(piece)
        if self._left < 0:
            raise _Enough
        return len(piece)

    def flush(self) -> None:
        pass


class _Chained:
    """A file object of bytes that have been read before, and of the rest of the file."""

    def __init__(self, start: bytes, rest: IO[bytes]):
        self._start, self._rest = start, rest

    def read(self, size: int = -1) -> bytes:
        if not self._start:
            return self._rest.read(size)
        piece, self._start = self._start[:size], self._start[size:]
        return piece


def read_age_header(file: IO[bytes]) -> bytes:
    """Read the header of an age file, with the line that ends it; up to the limit if there is no such line."""
    header = b""
    while line := file.readline(_LONGEST_HEADER):
        header += line
        if line.startswith(_HEADER_END[1:]) or len(header) > _LONGEST_HEADER:
            break
    return header


def _changed(path: Path) -> DamagedWeights:
    return DamagedWeights(f"{shortened(path)} was changed, cut or replaced since it was encrypted; copy it again")


def _identities(text: str) -> "list[pyrage.x25519.Identity | pyrage.ssh.Identity]":
    """Parse age identities, one a line, or an SSH private key. Raises ConfigError, which never shows the text."""
    try:
        import pyrage
    except ImportError:
        raise ConfigError("encrypted models need pyrage: pip install 'octavo[secrets]'") from None
    try:
        if text.startswith("-----BEGIN"):
            return [pyrage.ssh.Identity.from_buffer(text.encode() + b"\n")]
        lines = [line.strip() for line in text.splitlines()]
        identities: list[Any] = [
            pyrage.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")
        ]
    except pyrage.IdentityError:
        identities = []
    if not identities:
        raise ConfigError(
            "model_identity holds no usable identity: it must be lines AGE-SECRET-KEY-1..., as age-keygen writes, or "
            "an SSH private key without a passphrase"
        )
    return identities

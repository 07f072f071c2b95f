"""Open untrusted files: only regular files, of bounded size. A model's files may be encrypted."""

import contextlib
import mmap
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, Union

from octavo.errors import ConfigError, DamagedWeights, ModelNotFound, shortened

if TYPE_CHECKING:
    from .encrypted_model import EncryptedPath

ModelPath = Union[Path, "EncryptedPath"]
"""Where a model, or a file of it, is: a path, or a path in an encrypted model."""

MANIFEST = "octavo-model.age"  # of an encrypted model, see encrypted_model.py


class MappedFile(Protocol):
    """The bytes of a file, mapped read-only.

    Attributes:
        data: All bytes. Those of an encrypted file are there after `wait`; its header is there from the start.
        path: Where this process can open the same bytes.
    """

    data: mmap.mmap
    path: Path

    def wait(self, start: int, stop: int) -> None:
        """Wait until the bytes start:stop can be read. Raises DamagedWeights or ModelNotFound."""
        ...

    def release(self, start: int, stop: int) -> None:
        """Free the memory of the bytes start:stop until they are read again."""
        ...


class PlainFile:
    """A MappedFile of a file that is not encrypted: the system reads its pages when they are touched."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path = data, path

    def wait(self, start: int, stop: int) -> None:
        pass

    def release(self, start: int, stop: int) -> None:
        start -= start % mmap.PAGESIZE  # also drops neighbors' bytes on the first and last page, which are read again
        with contextlib.suppress(OSError):  # memory that is locked (process_guard.py) stays
            self.data.madvise(mmap.MADV_DONTNEED, start, stop - start)


def unlock(path: Path, identity: str | None) -> ModelPath:
    """Return the path of a model's files: `path` itself if the model is not encrypted.

    Args:
        path: A directory, or a .gguf file.
        identity: See EncryptedModel; None if there is none.

    Raises:
        ConfigError: The model is encrypted, and there is no usable identity.
        DamagedWeights: The model was changed, or it is encrypted for other identities.
    """
    if not (path / MANIFEST).exists():
        return path
    if identity is None:
        raise ConfigError(f"{shortened(path)} is encrypted; give the age identity that opens it: --model-identity FILE")
    from .encrypted_model import EncryptedModel, EncryptedPath

    model = EncryptedModel(path, identity)
    return EncryptedPath(model, model.manifest.gguf)


def read_file(path: ModelPath, limit: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        ModelNotFound: There is no such file, it may not be read, or it is not a regular file.
        DamagedWeights: It is larger than `limit` bytes, or it is encrypted and was changed.
    """
    content = _read(path, limit + 1) if isinstance(path, Path) else path.read(limit + 1)
    if len(content) > limit:
        raise DamagedWeights(f"{path} is larger than {limit >> 20} MiB, the limit for such files")
    return content


def map_file(path: ModelPath) -> MappedFile:
    """Map a regular file into memory, read-only, without reading it.

    Raises:
        ModelNotFound: There is no such file, it may not be read, or it is not a regular file.
        DamagedWeights: It is empty, or it is encrypted and was changed.
    """
    if not isinstance(path, Path):
        return path.map()
    with open_regular(path) as file:
        try:
            return PlainFile(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)
        except ValueError:  # mmap raises it for an empty file
            raise DamagedWeights(f"{path} is empty; download it again") from None
        except OSError as error:
            raise ModelNotFound(f"cannot read {shortened(path)}: {error.strerror}") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. FIFOs and devices are refused, since opening one could wait forever.

    Raises:
        ModelNotFound: There is no such file, it may not be read, or it is not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except FileNotFoundError:
        raise ModelNotFound(f"{shortened(path)} is missing; download the model again") from None
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"cannot read {shortened(path)}: {getattr(error, 'strerror', None) or error}") from None
    raise ModelNotFound(f"{shortened(path)} is not a regular file; a model consists of regular files")


def _read(path: Path, limit: int) -> bytes:
    with open_regular(path) as file:
        return file.read(limit)

"""Open untrusted files: only regular files, of bounded size."""

import mmap
import os
import stat
from pathlib import Path
from typing import BinaryIO

from octavo.errors import DamagedWeights, ModelNotFound, shortened


def read_file(path: Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        ModelNotFound: There is no such file, it may not be read, or it is not a regular file.
        DamagedWeights: It is larger than `limit` bytes.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DamagedWeights(f"{path} is larger than {limit >> 20} MiB, the limit for such files")
    return content


def map_file(path: Path) -> mmap.mmap:
    """Map a regular file into memory, read-only, without reading it.

    Raises:
        ModelNotFound: There is no such file, it may not be read, or it is not a regular file.
        DamagedWeights: It is empty.
    """
    with open_regular(path) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
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

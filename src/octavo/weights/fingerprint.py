"""A name for a checkpoint's content, told from a part of it."""

import json
from hashlib import blake2b

import numpy as np

from .checkpoint import Checkpoint

_PIECES, _PIECE = 8, 512  # of each large tensor, in bytes


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hex digest of the configuration, and of each tensor's name, shape, format and some of its bytes.

    Small tensors count whole, of others some pieces from the first byte to the last: a few milliseconds, whatever the
    model's size. Training in any form changes most values of a tensor, and a piece has many; a single value that
    somebody changes by hand is not noticed.
    """
    hash = blake2b(json.dumps(checkpoint.config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(checkpoint.stored.items()):
        hash.update(f"\n{name} {tensor.shape} {tensor.format} ".encode())
        content = tensor.data.reshape(-1)
        if content.size <= _PIECES * _PIECE:
            hash.update(content.tobytes())
        else:
            for start in np.linspace(0, content.size - _PIECE, _PIECES, dtype=np.int64):
                hash.update(content[start : start + _PIECE].data)
        tensor.release()  # around each piece the system has mapped up to 2 MB
    return hash.hexdigest()

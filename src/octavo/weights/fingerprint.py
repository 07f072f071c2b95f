"""A hash that identifies the content of a checkpoint, computed from a sample of its bytes."""

import json
from hashlib import blake2b

import numpy as np

from .checkpoint import Checkpoint

_PIECES, _PIECE = 8, 512  # of each large tensor: how many, and their size in bytes


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hex digest of the configuration and of each tensor's name, shape, format and a sample of its bytes.

    Small tensors are hashed completely, larger ones in 8 evenly spaced pieces of 512 bytes. This takes a few
    milliseconds for models of any size. Training changes most values of a tensor and therefore the digest. A change of
    a single value may not change it. The fingerprint of an encrypted model is in its manifest, since its tensors are in
    memory only until they are packed.
    """
    if checkpoint.known_fingerprint is not None:
        return checkpoint.known_fingerprint
    hash = blake2b(json.dumps(checkpoint.config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(checkpoint.stored.items()):
        hash.update(f"\n{name} {tensor.shape} {tensor.format} ".encode())
        content = tensor.data.reshape(-1)
        if content.size <= _PIECES * _PIECE:
            hash.update(content.tobytes())
        else:
            for start in np.linspace(0, content.size - _PIECE, _PIECES, dtype=np.int64):
                hash.update(content[start : start + _PIECE].data)
        tensor.release()  # the system has mapped up to 2 MB around each piece
    return hash.hexdigest()

"""The secret that engines and frontends of a Ray cluster share, so that nobody else can use the engines."""

import os
import secrets

from ray.experimental import internal_kv

_KEY, _NAMESPACE = b"secret of engines", b"octavo"
_VARIABLE = "OCTAVO_SECRET_RAY"


def secret_source() -> str:
    """Return what `secret_file` may name in a process of the cluster.

    The secret is made once, by whoever asks first, and is kept by Ray's head node, in its GCS, as long as the cluster
    lives. So the engines and frontends of two versions of an application can use each other while it is updated.
    """
    made = secrets.token_hex(32).encode()
    internal_kv._internal_kv_put(_KEY, made, overwrite=False, namespace=_NAMESPACE)
    os.environ[_VARIABLE] = internal_kv._internal_kv_get(_KEY, namespace=_NAMESPACE).decode()
    return f"env:{_VARIABLE}"

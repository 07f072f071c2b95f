"""Octavo on a Ray cluster: engines and frontends as deployments of Ray Serve (docs/ray.md).

engine.py: one engine of a model; Ray places it, replaces it, and adds and removes others. frontend.py: the HTTP
server, which uses the engines over the network as `octavo serve --engines` does. autoscaling.py: how many engines a
model needs. app.py: both as one application for `serve run`. cluster_secret.py: what keeps others out.

datasets.py: batch enrichment of Ray Datasets.
"""

from typing import TYPE_CHECKING, Any

from .app import app
from .autoscaling import Autoscaling

if TYPE_CHECKING:
    from .datasets import enrich

__all__ = ["Autoscaling", "app", "enrich"]


def __getattr__(name: str) -> Any:
    if name != "enrich":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .datasets import enrich  # imported late: Ray Data needs pandas and PyArrow, which serving does not

    return enrich

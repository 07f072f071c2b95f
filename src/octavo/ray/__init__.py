"""Octavo on a Ray cluster: engines and frontends as deployments of Ray Serve (docs/ray.md).

engine.py: one engine of a model; Ray places it, replaces it, and adds and removes others. frontend.py: the HTTP
server, which uses the engines over the network as `octavo serve --engines` does. autoscaling.py: how many engines a
model needs. app.py: both as one application for `serve run`.
"""

from .app import app
from .autoscaling import Autoscaling

__all__ = ["Autoscaling", "app"]

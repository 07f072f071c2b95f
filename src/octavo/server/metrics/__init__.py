"""Metrics for Prometheus: GET /metrics (docs/metrics.md)."""

from .exporter import Exporter
from .http_meter import HttpMeter
from .routes import routes

__all__ = ["Exporter", "HttpMeter", "routes"]

"""Catalog: the names, types and labels of all metrics, for programs that write queries (deploy/monitoring)."""

from prometheus_client import CollectorRegistry, ProcessCollector

from .exporter import Snapshot
from .families import Families
from .http_meter import HttpMeter
from .text_format import Family


def catalog() -> list[Family]:
    """Return all families that a scrape can show, without samples."""
    nothing = Snapshot(meters={}, engines=[], totals={}, swap_rates={}, devices={}, http=HttpMeter())
    families = [Family(each.name, each.kind, each.help, each.labels, ()) for each in Families(nothing)]
    for metric in ProcessCollector(registry=CollectorRegistry(auto_describe=False)).collect():
        if metric.type == "counter":
            families.append(Family(f"{metric.name}_total", "counter", metric.documentation, (), ()))
        else:
            families.append(Family(metric.name, "gauge", metric.documentation, (), ()))
    return families

"""Grafana: a dashboard as the JSON that Grafana reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # columns of a dashboard
HEIGHTS = {"stat": 4, "timeseries": 8, "table": 8}
SCHEMA = 41  # of Grafana 12


@dataclass(frozen=True)
class Panel:
    """A chart, a row of numbers or a table.

    Attributes:
        unit: one of Grafana's, such as "s" for seconds.
        description: what it shows, in plain words.
        queries: expressions by their legends, in which {{label}} is the value of a label; of a table, by the titles of
            its columns.
        stacked: whether the values add up to something.
        max: the end of the scale, if it is fixed.
    """

    title: str
    unit: str
    description: str
    queries: Mapping[str, str]
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    stacked: bool = False
    max: float | None = None


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard, among the values of a label."""

    name: str
    series: str
    label: str


@dataclass(frozen=True)
class Dashboard:
    """Rows of panels; those of a row are equally wide.

    Attributes:
        id: part of its address and the name of its file.
        rows: panels, by the row's title.
    """

    id: str
    title: str
    description: str
    variables: Sequence[Variable]
    rows: Mapping[str, Sequence[Panel]]

    def json(self) -> dict[str, Any]:
        """Return the dashboard as Grafana reads it."""
        return {
            "uid": f"octavo-{self.id}",
            "title": self.title,
            "description": self.description,
            "tags": ["octavo"],
            "schemaVersion": SCHEMA,
            "editable": True,
            "graphTooltip": 1,  # the crosshair is shown in all panels
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": [_data_source(), *map(_variable, self.variables)]},
            "links": [_link_to_others()],
            "panels": self._panels(),
        }

    def _panels(self) -> list[dict[str, Any]]:
        panels, ids, y = list[dict[str, Any]](), count(1), 0
        for title, row in self.rows.items():
            place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
            panels.append(
                {"id": next(ids), "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
            )
            width, height = WIDTH // len(row), max(HEIGHTS[panel.kind] for panel in row)
            for number, panel in enumerate(row):
                place = {"x": number * width, "y": y + 1, "w": width, "h": height}
                panels.append({"id": next(ids), "gridPos": place, **_panel(panel)})
            y += 1 + height
        return panels


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": DATA_SOURCE,
            "expr": expr,
            "legendFormat": legend,
            "instant": panel.kind != "timeseries",
            "range": panel.kind == "timeseries",
            "format": "table" if panel.kind == "table" else "time_series",
        }
        for number, (legend, expr) in enumerate(panel.queries.items())
    ]
    limits = {"min": 0} if panel.max is None else {"min": 0, "max": panel.max}
    look = {
        "timeseries": ({"custom": _lines(panel.stacked), **limits}, _LEGEND),
        "stat": (limits, {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "none", "colorMode": "none"}),
        "table": ({}, {"showHeader": True}),
    }
    defaults, options = look[panel.kind]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATA_SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, **defaults}, "overrides": []},
        "options": options,
        **({"transformations": _columns(panel)} if panel.kind == "table" else {}),
    }


def _lines(stacked: bool) -> dict[str, Any]:
    return {
        "fillOpacity": 30 if stacked else 8,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }


_LEGEND = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


def _columns(panel: Panel) -> list[dict[str, Any]]:
    """Return the transformations that make a table of labels and values. The value of a lone query is left out."""
    titles = {f"Value #{chr(ord('A') + number)}": title for number, title in enumerate(panel.queries)}
    hidden = dict.fromkeys(("Time", "__name__", "job", "Value"), True)
    return [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": hidden, "renameByName": titles}},
    ]


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "label": variable.name.capitalize(),
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": {"query": f"label_values({variable.series}, {variable.label})", "refId": variable.name},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _link_to_others() -> dict[str, Any]:
    return {"title": "Octavo", "type": "dashboards", "tags": ["octavo"], "asDropdown": True, "includeVars": True,
            "keepTime": True}  # fmt: skip

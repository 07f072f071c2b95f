"""The files that are generated."""

import json
from typing import Any

import yaml

from .dashboards import DASHBOARDS
from .rules import alert_rules, prometheus_config, recording_rules

HEADER = "# Written by `python -m deploy.monitoring`; change deploy/monitoring/rules.py instead.\n"
CONFIG_HEADER = """\
# Written by `python -m deploy.monitoring`, as a start for your own.
# Where Octavo has API keys, /metrics needs its admin key (OCTAVO_ADMIN_KEY). Add to the job:
#   authorization: {type: Bearer, credentials: "…"}
"""


def files() -> dict[str, str]:
    """Return the text of each file, by its path below deploy/."""
    dashboards = {f"grafana/dashboards/{each.id}.json": json.dumps(each.json(), indent=2) for each in DASHBOARDS}
    return {
        "prometheus/prometheus.yml": CONFIG_HEADER + _yaml(prometheus_config()),
        "prometheus/recording.yml": HEADER + _yaml(recording_rules()),
        "prometheus/alerts.yml": HEADER + _yaml(alert_rules()),
        **{path: text + "\n" for path, text in dashboards.items()},
    }


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=120)

"""The dashboards of deploy/grafana and the rules of deploy/prometheus: `python -m deploy.monitoring` writes them.

rules.py and dashboards/ describe them; promql.py writes queries, and refuses names and labels that Octavo does not
export; grafana.py turns a description into Grafana's JSON.
"""

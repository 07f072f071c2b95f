"""Write the dashboards of deploy/grafana and the rules of deploy/prometheus."""

from pathlib import Path

from .files import files

for path, text in files().items():
    (Path(__file__).parents[1] / path).write_text(text)

"""Scrape: an answer to GET /metrics, read by prometheus_client's parser."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """The samples of one answer, added up as a dashboard would."""

    def __init__(self, url: str):
        reply = httpx.get(f"{url}/metrics", timeout=60)
        assert reply.status_code == 200 and reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        self.families = {family.name: family for family in text_string_to_metric_families(reply.text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]
        series = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in self.samples]
        assert len(series) == len(set(series)), "Prometheus refuses a series that occurs twice"

    def sum(self, name: str, **labels: str) -> float:
        found = [each for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        return sum(each.value for each in found)

    def bucket(self, name: str, bound: float) -> float:
        """Return the number of values up to `bound`."""
        found = [each for each in self.samples if each.name == f"{name}_bucket" and float(each.labels["le"]) == bound]
        return sum(each.value for each in found)

    def grew(self, before: "Scrape") -> None:
        """Check that no counter is lower than before."""
        kinds = {family.name: family.type for family in self.families.values()}
        cumulative = [name for name, kind in kinds.items() if kind in ("counter", "histogram")]
        for name in [*cumulative, "vllm_tokens_generated"]:
            now = {(each.name, *sorted(each.labels.items())): each.value for each in self.families[name].samples}
            for each in before.families[name].samples:
                assert now[each.name, *sorted(each.labels.items())] >= each.value, each

"""HttpMeter: count HTTP requests by route, method and status, and measure how long they take."""

import time
from collections import Counter

from octavo.frontend.meter import Histogram
from octavo.server.edge.access_log import CLIENT_LEFT, RequestRecord

NO_ROUTE = "none"
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
OTHER_METHOD = "other"
SECONDS = (0.1, 0.5, 1.0)


class HttpMeter:
    """Counts the requests that have ended.

    Attributes:
        requests: by route, method and class of status, such as ("/health", "GET", "2xx").
        durations: seconds until the end of the response, by route and method.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.durations: dict[tuple[str, str], Histogram] = {}

    def ended(self, path: str | None, record: RequestRecord) -> None:
        """Count a request.

        Args:
            path: that of its route, so that parameters in paths do not make new series; None if no route has its path.
        """
        key = path or NO_ROUTE, record.method if record.method in METHODS else OTHER_METHOD
        status = record.status if record.complete else CLIENT_LEFT
        self.requests[*key, f"{status // 100}xx"] += 1
        if (durations := self.durations.get(key)) is None:
            durations = self.durations[key] = Histogram(SECONDS)
        durations.observe(time.perf_counter() - record.started)

    def copy(self) -> "HttpMeter":
        """Return a snapshot."""
        copy = HttpMeter()
        copy.requests = self.requests.copy()
        copy.durations = {key: histogram.copy() for key, histogram in self.durations.items()}
        return copy

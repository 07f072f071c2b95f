"""Autoscaling: how many engines a model needs for the work that waits."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

QUEUED_TOKENS, QUEUED_SECONDS, REQUESTS = "queued_tokens", "queued_seconds", "requests"  # what engines report


@dataclass(frozen=True)
class Autoscaling:
    """The number of engines of a model, between two bounds. With `max_engines` equal to `min_engines`, it is fixed.

    Attributes:
        min_engines: 0 ends the last engine when nobody has used the model for `down_delay` seconds. The next request
            waits until an engine has loaded the model again.
        queued_tokens: tokens of prompts that may wait for one engine.
        ttft: goal for the time to the first token, in seconds: so many seconds of work may wait for one engine, by its
            measured speed. None: no goal.
        requests: running and waiting requests for which one engine is enough.
        up_delay, down_delay: seconds for which more, or fewer, engines must be needed before their number changes.
    """

    min_engines: int = 1
    max_engines: int = 1
    queued_tokens: int = 4096
    ttft: float | None = None
    requests: int = 64
    up_delay: float = 5.0
    down_delay: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_engines <= self.max_engines or self.max_engines < 1:
            raise ValueError("max_engines must be at least 1, and min_engines from 0 to max_engines")
        if min(self.queued_tokens, self.requests, 1 if self.ttft is None else self.ttft) <= 0:
            raise ValueError("queued_tokens, requests and ttft must be greater than 0")

    def engines(self, work: Mapping[str, float]) -> int:
        """Return how many engines the reported work needs, without regard to the bounds."""
        needed = [work.get(QUEUED_TOKENS, 0) / self.queued_tokens, work.get(REQUESTS, 0) / self.requests]
        if self.ttft is not None:
            needed.append(work.get(QUEUED_SECONDS, 0) / self.ttft)
        return math.ceil(max(needed))

    def for_serve(self) -> dict[str, Any]:
        """Return the autoscaling_config of a Ray Serve deployment."""
        return {
            "min_replicas": self.min_engines,
            "max_replicas": self.max_engines,
            "initial_replicas": max(1, self.min_engines),
            "upscale_delay_s": self.up_delay,
            "downscale_delay_s": self.down_delay,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 2.0,
            "policy": {"policy_function": NeededEngines, "policy_kwargs": {"autoscaling": asdict(self)}},
        }


class NeededEngines:
    """The policy of Ray Serve's autoscaler: the engines that the reported work needs.

    Args:
        autoscaling: the fields of an Autoscaling.
    """

    def __init__(self, autoscaling: Mapping[str, Any]):
        self._autoscaling = Autoscaling(**autoscaling)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Add up what the engines report; see ray.serve.config.AutoscalingContext."""
        reported = context.aggregated_metrics or {}
        return self._autoscaling.engines({name: sum(values.values()) for name, values in reported.items()}), {}

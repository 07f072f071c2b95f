"""Trial: how settings serve a load, in a simulation."""

import dataclasses
from dataclasses import dataclass

import msgspec

from octavo.config import EngineConfig
from octavo.simulation import CostModel, Shape
from octavo.simulation.replay import simulate

from .goal import Goal, Load, Times

KEEPS_UP = 0.97  # share of the sustained rate up to which a queue does not grow without end


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A simulated run.

    Attributes:
        times: None if no request got all its tokens.
        output_rate: Tokens per second.
        sustained: Requests per second if all arrive at once; None for streams, which wait for answers.
        pages_held: The most pages that running sequences held.
        running: The most sequences that ran at the same time.
        failed: Requests that did not get all their tokens.
        share: See Goal.share; infinity if requests failed or the queue grows without end.
    """

    config: EngineConfig
    load: Load
    times: Times | None
    output_rate: float
    sustained: float | None
    pages_held: int
    running: int
    failed: int
    share: float

    @property
    def keeps_up(self) -> bool:
        """Return whether the queue stays short."""
        return self.sustained is None or (self.load.rate or 0) <= KEEPS_UP * self.sustained


def try_out(config: EngineConfig, costs: CostModel, pages: int, load: Load, goal: Goal) -> Trial:
    """Simulate how an engine of so many pages serves a load."""
    # The requests share no prompts, so that a prefix cache would find nothing.
    config_alone = dataclasses.replace(
        config,
        enable_prefix_caching=False,
        kv_disk=None,
        kv_host_memory=None,
        kv_store=None,
        trace=None,
        speculative_tokens=0,
    )
    typical = Shape(1, 1, 1, load.input_len + load.output_len, load.input_len + load.output_len)
    trace = load.trace(costs.seconds(typical))
    run = simulate(trace, config_alone, costs, pages)
    sustained = None
    if load.rate is not None:
        at_once = [msgspec.structs.replace(request, at=0.0) for request in trace]
        patient = dataclasses.replace(config_alone, max_queue=len(trace), request_timeout=None)
        sustained = len(trace) / simulate(at_once, patient, costs, pages).seconds
    times = goal.times(run.served)
    trial = Trial(
        config=config,
        load=load,
        times=times,
        output_rate=sum(each.output_tokens for each in run.served) / run.seconds,
        sustained=sustained,
        pages_held=run.pages.peak,
        running=run.running.peak,
        failed=sum(each.problem is not None for each in run.served),
        share=float("inf") if times is None else goal.share(times),
    )
    return trial if trial.keeps_up and not trial.failed else dataclasses.replace(trial, share=float("inf"))

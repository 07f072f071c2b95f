"""Search the settings that serve a load best, by simulation, and the most load that they serve within a goal."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.kv import pages_for
from octavo.simulation import CostModel

from .goal import Goal, Load
from .trial import Trial, try_out

BATCH_TOKENS = (512, 64, 128, 256, 1024)  # the default first
NEARLY = 0.02  # a share of the time below which a difference does not matter, and the default stays
HEADROOM = 2  # times the pages that the load holds at most
MIB = 2**20
FAR, PRECISION = 32, 0.05  # of the search for the most load: the factor at which it ends, and its relative error
GROWTH = 2  # of the load, until a single one of several settings is within the goal


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The best settings.

    Attributes:
        trial: How they serve the load, with the proposed memory of the KV cache.
        meets: Whether that is within the goal.
        memory_reason: Why the KV cache has this memory.
        most: The most load that they serve within the goal; None if there is no goal, or if they serve none.
    """

    trial: Trial
    meets: bool
    memory_reason: str
    most: Load | None


def trials(config: EngineConfig, costs: CostModel, load: Load, goal: Goal, fixed: set[str]) -> Iterator[Trial]:
    """Yield simulations with one cost model: of several batch_tokens, then of smaller batches if none meets the goal.

    Args:
        fixed: Names of the settings that stay as they are.
    """
    limit = max_batch_tokens(fixed, config)
    tokens = [config.max_batch_tokens] if "max_batch_tokens" in fixed else [n for n in BATCH_TOKENS if n <= limit]
    pages = pages_of(config, costs)
    tried = []
    for count in tokens:
        tried.append(try_out(dataclasses.replace(config, max_batch_tokens=count), costs, pages, load, goal))
        yield tried[-1]
    best = best_of(tried)
    if "max_batch_size" in fixed or not goal.is_set or best.share <= 1 or not best.keeps_up:
        return
    for divisor in (2, 4):  # fewer sequences at a time: each gets its tokens sooner, and others wait longer
        if size := best.running // divisor:
            yield try_out(dataclasses.replace(best.config, max_batch_size=size), costs, pages, load, goal)


def max_batch_tokens(fixed: set[str], config: EngineConfig) -> int:
    """Return the largest max_batch_tokens to try, for which costs must be measured."""
    return config.max_batch_tokens if "max_batch_tokens" in fixed else max(BATCH_TOKENS)


def best_of(tried: Sequence[Trial]) -> Trial:
    """Return the trial that uses the least of the goal's limits; the first of those that are nearly equal.

    Of trials whose queue grows without end, it is the one that serves the most requests.
    """

    def badness(trial: Trial) -> tuple[int, float]:
        if math.isfinite(trial.share):
            return 0, trial.share
        return (1, 1 / trial.sustained) if trial.sustained else (2, math.inf)

    least = min(map(badness, tried))
    return next(t for t in tried if badness(t)[0] == least[0] and badness(t)[1] <= least[1] * (1 + NEARLY))


def chosen(by_quantization: Mapping[str, Sequence[Trial]], costs: Mapping[str, CostModel], goal: Goal) -> Trial:
    """Return the best trial of the first quantization that meets the goal, or the best of all if none does."""
    for name, tried in by_quantization.items():
        within = [trial for trial in tried if trial.share <= 1]
        if goal.is_set and within:
            return _strongest(within, costs[name], goal)
    return best_of([best_of(tried) for tried in by_quantization.values()])


def _strongest(within: Sequence[Trial], costs: CostModel, goal: Goal) -> Trial:
    """Return the one of these trials whose settings stay within the goal under the most load."""
    rest = list(within)
    load, first = within[0].load, within[0].load.amount
    while len(rest) > 1 and load.amount < FAR * first:
        load = load.of(max(GROWTH * load.amount, load.amount + 1 if load.streams else 0))
        again = [try_out(trial.config, costs, pages_of(trial.config, costs), load, goal) for trial in rest]
        if not (still := [trial for trial in again if trial.share <= 1]):
            break
        rest = still
    best = best_of(rest)
    return next(trial for trial in within if trial.config == best.config)


def propose(trial: Trial, costs: CostModel, goal: Goal, fixed: set[str], advance: Callable[[], None]) -> Proposal:
    """Return the settings of a trial with memory for the KV cache, and the most load that they serve.

    Args:
        advance: Called after each simulation.
    """
    config, reason = trial.config, "as set"
    if "kv_cache_memory" not in fixed:
        config, reason = _with_memory(trial, costs)
    pages = pages_of(config, costs)

    def run(load: Load) -> Trial:
        result = try_out(config, costs, pages, load, goal)
        advance()
        return result

    final = run(trial.load)
    most = _most(run, trial.load) if goal.is_set else None
    return Proposal(trial=final, meets=final.share <= 1 or not goal.is_set, memory_reason=reason, most=most)


def pages_of(config: EngineConfig, costs: CostModel) -> int:
    """Return the pages of the KV cache: those of the measured engine, or what kv_cache_memory holds."""
    return costs.num_pages if config.kv_cache_memory is None else config.kv_cache_memory // costs.page_bytes


def _with_memory(trial: Trial, costs: CostModel) -> tuple[EngineConfig, str]:
    longest = pages_for(trial.config.max_model_len or costs.max_model_len, costs.page_size)
    held = HEADROOM * trial.pages_held
    available = pages_of(trial.config, costs)
    wanted = max(longest, held)
    if wanted > available:
        pages, reason = available, f"all that is free for it; {wanted:,} pages would be better"
    elif held >= longest:
        pages, reason = held, f"{HEADROOM} × the {trial.pages_held:,} pages that the load holds at most"
    else:
        most = trial.config.max_model_len or costs.max_model_len
        pages, reason = longest, f"one request of {most:,} tokens fits; the load holds {trial.pages_held:,} pages"
    size = pages * costs.page_bytes
    rounded = -(-size // (16 * MIB)) * 16 * MIB if pages < available else size // MIB * MIB
    return dataclasses.replace(trial.config, kv_cache_memory=rounded), reason


def _most(run: Callable[[Load], Trial], load: Load) -> Load | None:
    """Return about the largest load like this one that stays within the goal; None if it is very small."""
    low, high = 0.0, load.amount
    while high <= FAR * load.amount and run(load.of(high)).share <= 1:
        low, high = high, 2 * high
    grain = 1.0 if load.streams else 0.0
    while high - low > max(grain, PRECISION * high) and high > load.amount / FAR:
        middle = load.of((low + high) / 2).amount
        low, high = (middle, high) if run(load.of(middle)).share <= 1 else (low, middle)
    return load.of(low) if low else None

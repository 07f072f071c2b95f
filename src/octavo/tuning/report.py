"""What octavo tune prints, and the file of settings that it writes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from octavo.config import EngineConfig
from octavo.engine.engine_plan import size
from octavo.errors import ConfigError
from octavo.settings import is_secret
from octavo.terminal import console, printable
from octavo.version import __version__

from .disturbance import Disturbance
from .goal import Goal
from .measuring import Screened
from .search import Proposal
from .trial import Trial

TUNED = ("quantization", "threads", "kv_cache_page_size", "max_batch_tokens", "max_batch_size", "kv_cache_memory")
LOSSLESS = "none"  # the quantization that leaves the weights as they are
SCOPE = "Times are simulated from measured steps of the model, without HTTP, tokenizing and the network."


def print_disturbance(disturbance: Disturbance) -> None:
    """Warn if other programs have disturbed the measurement."""
    if disturbance.is_notable:
        console(stderr=True).print(
            f"octavo: other programs kept {disturbance.processors:.1f} processors busy, so that the measured times are "
            "too long and unsteady; run this again when the machine is idle",
            soft_wrap=True,
        )


def print_screened(result: Screened) -> None:
    """Print one line about a measurement."""
    steps = ", ".join(f"{name} {ms:,.1f} ms" for name, ms in result.steps.items())
    console().print(f"Measured {_threads(result.threads)}, pages of {result.page_size}: {steps}", soft_wrap=True)


def print_trials(tried: Sequence[Trial], best: Trial, goal: Goal) -> None:
    """Print a table with a row for each simulation."""
    table = Table(
        *("", "Weights", "Batch\ntokens", "Batch\nsize", "First\ntoken", "Per\ntoken", "Whole\nrequest"),
        *("Tokens\nper s", "Pages\nheld", "Goal"),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title=f"Simulated: milliseconds that {goal.percentile:g} % of the requests do not exceed",
        title_justify="left",
    )
    for column in table.columns[2:-1]:
        column.justify = "right"
    for trial in tried:
        times = trial.times
        figures = (times.first, times.per_token, times.whole) if times else (None, None, None)
        table.add_row(
            "→" if trial is best else "",
            trial.config.quantization,
            f"{trial.config.max_batch_tokens:,}",
            f"{trial.config.max_batch_size:,}",
            *("" if ms is None else f"{ms:,.0f}" if ms >= 100 else f"{ms:,.1f}" for ms in figures),
            f"{trial.output_rate:,.0f}",
            f"{trial.pages_held:,}",
            _outcome(trial, goal),
        )
    console().print(table)


def _outcome(trial: Trial, goal: Goal) -> str:
    """Return in a word or two whether a trial is within the goal."""
    if not trial.keeps_up:
        return "queue grows"
    if trial.failed:
        return f"{trial.failed:,} failed"
    if not goal.is_set:
        return ""
    return "met" if trial.share <= 1 else "missed"


def conclusion(proposal: Proposal, goal: Goal, may_quantize: bool) -> list[str]:
    """Return the sentences that say whether the goal is met, and what else is possible."""
    trial = proposal.trial
    config, times = trial.config, trial.times
    lines = []
    if not goal.is_set:
        lines.append("No limit is set: these settings give the shortest requests. --ttft-ms and --tpot-ms set limits.")
    elif proposal.meets:
        lines.append("The goal is met.")
    elif times is None or trial.failed:
        lines.append("The goal cannot be met here: not all requests get all their tokens.")
    elif trial.keeps_up:
        per_token = "" if times.per_token is None else f", {times.per_token:,.1f} ms per token"
        lines.append(
            "The goal cannot be met here. The best possible at this load: "
            f"{times.first:,.0f} ms to the first token{per_token}."
        )
    if not trial.keeps_up and trial.sustained:
        lines.append(
            f"This machine serves at most {trial.load.of(trial.sustained).amount_text}, at any speed; with more, the "
            f"queue grows without end. {math.ceil(trial.load.amount / trial.sustained)} such machines would keep up."
        )
    if goal.is_set and proposal.most is not None:
        lines.append(f"These settings are within the goal up to about {proposal.most.amount_text}.")
    elif goal.is_set:
        lines.append("These settings do not reach the goal at any load: one request alone is too slow.")
    if not proposal.meets and not may_quantize:
        lines.append("--allow-quantization also tries 8bit and 4bit weights. They are faster and change the answers.")
    if config.quantization not in (LOSSLESS, "auto") and may_quantize:
        lines.append(f"Quantization {config.quantization} changes the answers: docs/quantization.md says how much.")
    return lines


def reasons(
    proposal: Proposal, screened: Sequence[Screened], tried: Sequence[Trial], fixed: set[str], may_quantize: bool
) -> dict[str, str]:
    """Return why each tuned setting has its value, by the setting's name."""
    config = proposal.trial.config
    others = [each for each in tried if each.config.quantization == config.quantization]
    best = "within the goal under the most load, of " if proposal.meets else "the best of "
    found = {
        "quantization": _quantization_reason(proposal, tried, may_quantize),
        "threads": _screened_reason(screened, "threads"),
        "kv_cache_page_size": _screened_reason(screened, "page_size"),
        "max_batch_tokens": f"{best}{_listed({each.config.max_batch_tokens for each in others})}",
        "max_batch_size": "the default"
        if config.max_batch_size == EngineConfig().max_batch_size
        else f"fewer at a time are faster each; the best of {_listed({each.config.max_batch_size for each in others})}",
        "kv_cache_memory": proposal.memory_reason,
    }
    return found | {name: "as set" for name in TUNED if name in fixed}


def settings_file(config: EngineConfig, given: Mapping[str, Any], why: Mapping[str, str], head: Sequence[str]) -> str:
    """Return the text of a --config file.

    Args:
        given: Settings that the user gave; those that are tuned have the values of `config`.
        why: Reasons by name, which become comments.
        head: Lines of comment for its beginning.
    """
    import yaml

    values = {"model": config.model, **given, **{name: getattr(config, name) for name in TUNED}}
    if values["kv_cache_memory"] is not None and values["kv_cache_memory"] % 2**20 == 0:
        values["kv_cache_memory"] = f"{values['kv_cache_memory'] // 2**20}MiB"
    lines = [f"# {printable(line, lines=False)}" for line in (*head, SCOPE)]
    for name, value in values.items():
        if name in why:
            lines.append(f"# {why[name]}")
        lines += yaml.safe_dump({name: value}, allow_unicode=True, width=1000).splitlines()
    return "\n".join(lines) + "\n"


def write_settings(path: Path, text: str, given: Mapping[str, Any]) -> None:
    """Write the file of settings; only its owner may read it if it has a secret. Raises ConfigError."""
    try:
        if any(is_secret(name) and value for name, value in given.items()):
            path.touch(mode=0o600)
            path.chmod(0o600)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def print_proposal(config: EngineConfig, why: Mapping[str, str], lines: Sequence[str]) -> None:
    """Print the proposed settings with the reasons, and the sentences of the conclusion."""
    plain = console()
    plain.print()
    for line in lines:
        plain.print(line, soft_wrap=True)
    plain.print()
    for name in TUNED:
        value = getattr(config, name)
        shown = size(value) if name == "kv_cache_memory" and value is not None else str(value)
        plain.print(f"{name:<18}  {shown:<8}  {why[name]}", soft_wrap=True)


def head_lines(config: EngineConfig, load: object, goal: Goal, machine: Mapping[str, Any]) -> list[str]:
    """Return the lines that say what was tuned, for what, and where."""
    isa = f", {machine['isa']} kernels" if machine.get("isa") else ""
    return [
        f"octavo tune {config.model_name}, by octavo {__version__} on {machine['cpu']}{isa}",
        f"Load: {load}",
        f"Goal: {goal}",
    ]


def _quantization_reason(proposal: Proposal, tried: Sequence[Trial], may_quantize: bool) -> str:
    names = list(dict.fromkeys(each.config.quantization for each in tried))
    if proposal.trial.config.quantization == LOSSLESS:
        more = "" if may_quantize or len(names) > 1 else "; others change the answers and need --allow-quantization"
        return f"the weights as they are{more}"
    return (
        f"{'the first within the goal' if proposal.meets else 'the fastest'} of {', '.join(names)}; changes the answers"
    )


def _screened_reason(screened: Sequence[Screened], name: str) -> str:
    """Return why the first of the measurements was chosen, as far as threads or page_size are concerned."""
    best, mine = screened[0], getattr(screened[0], name)
    others = [each for each in screened[1:] if getattr(each, name) != mine]
    if not others:
        return "the only choice here"
    compared = []
    for other in others:
        ratios = [other.steps[step] / best.steps[step] for step in best.steps if step in other.steps]
        change = math.exp(sum(map(math.log, ratios)) / len(ratios)) - 1
        compared.append(f"{getattr(other, name)} takes {abs(change):.0%} {'longer' if change > 0 else 'less'}")
    return ", ".join(compared)


def _listed(numbers: set[int]) -> str:
    return ", ".join(f"{number:,}" for number in sorted(numbers))


def _threads(count: int) -> str:
    return f"{count} {'thread' if count == 1 else 'threads'}"

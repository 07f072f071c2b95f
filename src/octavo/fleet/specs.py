"""The description of a fleet as plain data, and how it is read from a models file (YAML)."""

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.settings import (
    Alias,
    Reading,
    Rule,
    Settings,
    Size,
    Source,
    environment_source,
    positive,
    read_yaml,
    resolve,
    setting,
    settings_of,
)
from octavo.vllm_settings import VLLM

STICKY = ("user", "request_id")
MAX_MODELS, MAX_NAMES = 256, 1024
_NAME = Rule("1 to 256 printable characters", lambda value: 0 < len(value) <= 256 and value.isprintable())
_REPLICAS = {"replicas": Alias(lambda value: Reading({"data_parallel_size": value}))}
_AN_ENTRY, _A_SPLIT = "{model: smollm2}", "{small: 90, large: 10}"


@dataclass(frozen=True, kw_only=True)
class Handling(Settings):
    """When a model of a fleet is loaded, and the other names by which clients may request it.

    Raises:
        ConfigError: For an invalid value.
    """

    aliases: list[str] = setting([], "Other names of the model.")
    keep_loaded: bool = setting(False, "Never unload the model to make memory free for another one.")
    load_on_demand: bool = setting(False, "Load the model when the first request for it arrives, not at start.")
    idle_unload: float | None = setting(
        None,
        "Unload the model when no request has used it for so many seconds. The next request loads it again.",
        positive("seconds"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for alias in self.aliases:
            self.need(_NAME.holds(alias), "aliases", f"names of {_NAME.what}")
        self.need(not (self.keep_loaded and self.idle_unload), "keep_loaded", "false with idle_unload")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model of a fleet. Its name in the API is `config.model_name`."""

    config: EngineConfig
    handling: Handling = dataclasses.field(default_factory=Handling)

    @property
    def name(self) -> str:
        return self.config.model_name

    @property
    def names(self) -> list[str]:
        """Return the name and the aliases."""
        return [self.name, *self.handling.aliases]

    def inherited(self) -> dict[str, Any]:
        """Return the settings that a model takes over which replaces this one."""
        given = {
            name: getattr(part, name)
            for part in (self.config, self.handling)
            for name in settings_of(type(part))
            if name not in ("model", "revision", "served_model_name")
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class SplitSpec:
    """A name whose requests are divided among models, for A/B tests.

    Attributes:
        shares: percent by model.
        sticky: "user" or "request_id": requests with the same one go to the same model. By default, each request
            counts for itself.
    """

    name: str
    shares: Mapping[str, float]
    sticky: str | None = None


@dataclass(frozen=True)
class FleetSpec:
    """The models of a server. The first one serves requests that name no model.

    Attributes:
        memory: budget in bytes for all processes of the server; None if the models need not share a budget.

    Raises:
        ConfigError: There is no model, a name occurs twice, or a split names no model or does not add up to 100.
    """

    models: Sequence[ModelSpec]
    splits: Sequence[SplitSpec] = ()
    memory: int | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.models) <= MAX_MODELS:
            raise ConfigError(f"a server needs from 1 to {MAX_MODELS} models, not {len(self.models)}")
        names = [name for model in self.models for name in model.names] + [split.name for split in self.splits]
        if len(names) > MAX_NAMES:
            raise ConfigError(f"there are {len(names)} names of models, aliases and splits, more than {MAX_NAMES}")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two models, aliases or splits have the name {twice!r}: give one of them another name")
        for split in self.splits:
            check_split(split, {model.name for model in self.models})


def check_split(split: SplitSpec, models: set[str]) -> None:
    """Raise ConfigError unless the shares of a split are of `models` and add up to 100."""
    for name, share in split.shares.items():
        if name not in models:
            raise ConfigError(f"the split {split.name!r} names {name!r}, which is no model: {_known(models)}")
        if not 0 <= share <= 100:
            raise ConfigError(f"the share of {name!r} in the split {split.name!r} must be from 0 to 100, not {share:g}")
    if abs((total := sum(split.shares.values())) - 100) > 1e-6:
        raise ConfigError(f"the shares of the split {split.name!r} add up to {total:g}, not to 100")


def read_models(file: Path, common: Mapping[str, Any]) -> FleetSpec:
    """Read a models file. Raises ConfigError.

    Args:
        common: settings for all models that do not set them.
    """
    content = read_yaml(file)
    try:
        _check_keys(content, ("models", "splits", "memory"), "models: {small: {model: smollm2}}")
        models = _mapping(content.get("models"), "models", f"{{small: {_AN_ENTRY}}}")
        specs = [model_spec(name, entry, common) for name, entry in models.items()]
        splits = content.get("splits")
        splits = {} if splits in (None, {}) else _mapping(splits, "splits", f"{{chat: {_A_SPLIT}}}")
        memory = _Memory(memory=content["memory"]).memory if "memory" in content else None
        return FleetSpec(specs, [_split(name, entry) for name, entry in splits.items()], memory)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def model_spec(name: Any, entry: Any, common: Mapping[str, Any] = {}) -> ModelSpec:
    """Return the model that `entry`, a mapping of settings, describes. Raises ConfigError.

    Args:
        entry: fields of EngineConfig and Handling; `replicas` stands for data_parallel_size. A string stands for
            {"model": string}.
        common: settings that `entry` may replace.
    """
    _check_name(name, "model")
    entry = {"model": entry} if isinstance(entry, str) else _mapping(entry, f"the model {name!r}", _AN_ENTRY)
    variables = {key: value for key, value in os.environ.items() if key != "OCTAVO_MODEL"}
    base = Source("flag", {k: v for k, v in common.items() if k != "model"}, lambda key, _: key)
    own = Source("file", entry, lambda key, _: key)
    try:
        for key in entry:
            if not isinstance(key, str):
                raise ConfigError(f"unknown setting {key!r}: octavo config lists all settings")
            if key.replace("-", "_") == "served_model_name":
                raise ConfigError(f"served_model_name is not possible: {name!r} is its name")
        sources = [environment_source(variables), base, own]
        resolved = resolve((EngineConfig, Handling), {**VLLM, **_REPLICAS}, sources, hint=False)
        resolved.values["served_model_name"] = name
        resolved.values.setdefault("model", name)
        return ModelSpec(config=resolved.build(EngineConfig), handling=resolved.build(Handling))
    except ConfigError as error:
        raise ConfigError(f"in the model {name!r}, {error}") from None


@dataclass(frozen=True, kw_only=True)
class _Memory(Settings):
    memory: Size = setting(2**30, "Budget of memory.")


def _split(name: Any, entry: Any) -> SplitSpec:
    _check_name(name, "split")
    shares = dict(_mapping(entry, f"the split {name!r}", _A_SPLIT))
    sticky = shares.pop("sticky", None)
    if sticky is not None and sticky not in STICKY:
        raise ConfigError(f"sticky of the split {name!r} must be user or request_id, not {sticky!r}")
    for model, share in shares.items():
        _check_name(model, "model")
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise ConfigError(
                f"the share of {model!r} in the split {name!r} must be a number of percent, not {share!r}"
            )
    return SplitSpec(name, {model: float(share) for model, share in shares.items()}, sticky)


def _check_name(name: Any, kind: str) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"a {kind}'s name must be text, not {name!r} (put it in quotes)")
    if not _NAME.holds(name):
        raise ConfigError(f"a {kind}'s name must have {_NAME.what}, not {name[:50]!r}")


def _mapping(value: Any, what: str, example: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{what} must be a mapping, such as {example}")
    return value


def _check_keys(value: Any, known: Sequence[str], example: str) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"it must hold a mapping, such as {example}")
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            raise ConfigError(f"unknown key {key!r}: {f'did you mean {close[0]}?' if close else _known(known)}")


def _known(names: Any) -> str:
    return f"there are {', '.join(sorted(names))}"

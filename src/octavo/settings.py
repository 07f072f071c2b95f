"""Read settings from flags, keywords, a YAML file, environment variables and defaults, with one conversion for all.

A class of settings is a frozen dataclass whose fields are made by `setting`, or by `dataclasses.field` with a `help` in
its metadata. If it inherits from Settings, its constructor converts and checks the fields.
"""

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from .errors import ConfigError

S = TypeVar("S")
Size = Annotated[int, "size"]
"""A number of bytes, which may be written as 4GiB or 500MB."""

PREFIX = "OCTAVO_"
NOT_SETTINGS = frozenset({"OCTAVO_ISA"})  # environment variables that other modules read
_BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_COUNTS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}  # 32k and 32K, as with vLLM
_LARGEST = 2**63 - 1
_LONGEST_FILE = 2**16  # bytes of a file of settings
_MOST_VALUES = 50_000  # in a file of settings
MASK = "***"  # printed instead of a secret
_SHOWN = 120  # characters of a wrong value in an error message


@dataclass(frozen=True)
class Rule:
    """A condition on a setting. The error message is "{name} must be {what}, not {value}"."""

    what: str
    holds: Callable[[Any], bool]


def at_least(low: int) -> Rule:
    return Rule(f"at least {low}", lambda value: value >= low)


def positive(unit: str) -> Rule:
    return Rule(f"a positive number of {unit}", lambda value: 0 < value < math.inf)


def one_of(*choices: str) -> Rule:
    return Rule(_listed(choices), lambda value: value in choices)


def setting(default: Any, help: str, rule: Rule | None = None) -> Any:
    """Declare a field of a class of settings. Optional fields may be None whatever their rule."""
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata={"help": help, "rule": rule})
    return field(default=default, metadata={"help": help, "rule": rule})


class Settings:
    """Base class for a frozen dataclass of settings: converts and checks every field.

    Raises:
        ConfigError: "{name} must be {what}, not {value}".
    """

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, f.name, checked(type(self), f.name, getattr(self, f.name)))

    def need(self, ok: bool, name: str, what: str) -> None:
        """Raise ConfigError unless `ok`: for rules over several settings."""
        if not ok:
            raise ConfigError(f"{name} must be {what}, not {_shown(getattr(self, name))}")


@dataclass(frozen=True)
class Reading:
    """The meaning of a foreign spelling of a setting, such as vLLM's.

    Attributes:
        settings: Octavo's settings by name.
        note: Text for the user about the translation; "" for none.
        ignored: Whether the foreign setting has no effect in Octavo.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    ignored: bool = False


@dataclass(frozen=True)
class Alias:
    """A foreign spelling of a setting, such as vLLM's.

    Attributes:
        read: Returns the meaning of a value, or None if the value is Octavo's own spelling. Raises ConfigError for a
            value that Octavo does not support and must not ignore.
        is_flag: Whether it is a flag without a value on the command line.
    """

    read: Callable[[Any], Reading | None]
    is_flag: bool = False


@dataclass(frozen=True)
class Source:
    """Values by name, and how their source spells names, such as "--max-batch-size" or "OCTAVO_MAX_BATCH_SIZE"."""

    kind: str  # environment, file, flag or keyword
    values: Mapping[str, Any]
    spell: Callable[[str, Any], str]  # of a name and its value
    where: str = ""  # put before an error message


@dataclass
class Resolved:
    """The settings given by any source. If several sources give one, the source of the highest rank wins.

    Attributes:
        values: Converted values by name; a missing name has its default.
        origins: The origin of each value by name, such as "flag --max-batch-size".
        warnings: Lines for the user.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def build(self, kind: type[S]) -> S:
        """Return an instance of a class of settings. Raises ConfigError."""
        return kind(**{name: self.values[name] for name in settings_of(kind) if name in self.values})


def resolve(
    classes: Sequence[type], aliases: Mapping[str, Alias], sources: Iterable[Source], hint: bool = True
) -> Resolved:
    """Merge sources of settings.

    Args:
        classes: The classes of settings; each name must be a field of one of them.
        aliases: Foreign spellings by name. An alias that is also the name of a setting translates its foreign values.
        sources: The sources in order of rank, the lowest first.
        hint: Whether to warn of every unknown OCTAVO_ variable, or only of likely misspellings.

    Raises:
        ConfigError: For an unknown name in a file, flag or keyword, and for an invalid value.
    """
    owners = {name: kind for kind in classes for name in settings_of(kind)}
    resolved, notes = Resolved(), _Notes()
    for source in sources:
        given: dict[str, str] = {}  # setting -> how this source spelled it
        for key, value in source.values.items():
            name = key.replace("-", "_")
            reading = aliases[name].read(value) if name in aliases else None
            if reading is None and name not in owners:
                _report_unknown(key, source, [*owners, *aliases], resolved.warnings, hint)
                continue
            spelling = source.spell(name, value)
            if reading:
                notes.add(spelling, value, reading)
            for setting_name, meant in (reading.settings if reading else {name: value}).items():
                if other := given.get(setting_name):
                    same = f"{other} and {spelling} are the same setting: leave one out"
                    raise ConfigError(f"{spelling} is set twice" if other == spelling else same)
                given[setting_name] = spelling
                if setting_name not in owners:
                    continue  # a setting of the server, in a process that has only an engine
                try:
                    resolved.values[setting_name] = checked(owners[setting_name], setting_name, meant)
                except ConfigError as error:
                    given_as = "" if setting_name == name else f" (given as {spelling})"
                    raise ConfigError(f"{source.where}{error}{given_as}") from None
                resolved.origins[setting_name] = (
                    f"{source.kind} {spelling}{' (vLLM)' if reading and reading.note else ''}"
                )
    resolved.warnings += notes.lines()
    return resolved


def environment_source(variables: Mapping[str, str] = os.environ) -> Source:
    """Return the settings among environment variables: OCTAVO_MAX_BATCH_SIZE is max_batch_size."""
    values = {
        name.removeprefix(PREFIX).lower(): text
        for name, text in variables.items()
        if name.startswith(PREFIX) and name not in NOT_SETTINGS
    }
    return Source("environment", values, lambda name, value: PREFIX + name.upper(), "in the environment, ")


def file_source(file: Path) -> Source:
    """Return the settings in a YAML file of `name: value` lines. Raises ConfigError."""
    settings = read_yaml(file)
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{file} must hold `name: value` lines, such as max_batch_size: 64")
    return Source("file", settings, lambda name, value: f"{name} in {file}", f"{file}: ")


def read_yaml(file: Path) -> Any:
    """Return the content of a YAML file; {} if it is empty. Raises ConfigError, also if a mapping has a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that occurs twice in a mapping; YAML would silently keep the last one."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise yaml.YAMLError(f"{twice} is set twice")
            return super().construct_mapping(node, deep)

    try:
        with file.open("rb") as stream:
            content = stream.read(_LONGEST_FILE + 1)
        if len(content) > _LONGEST_FILE:
            raise OSError(f"it has more than {_LONGEST_FILE} bytes")
        settings = yaml.load(content.decode("utf-8"), Loader)
        if not _is_small(settings):
            raise ValueError(f"it has more than {_MOST_VALUES} values, or one that contains itself")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"cannot read {file}: {' '.join(str(error).split())}") from None
    return {} if settings is None else settings


def _is_small(value: Any) -> bool:
    """Return whether `value` has at most _MOST_VALUES values in it: YAML's aliases can make a few lines endless."""
    rest, count = [value], 0
    while rest and count <= _MOST_VALUES:
        each = rest.pop()
        count += 1
        if isinstance(each, dict):
            rest += each.values()
        elif isinstance(each, list | tuple | set):
            rest += each
    return not rest


def flag_source(flags: Mapping[str, Any]) -> Source:
    """Return the settings among the flags of a command; a flag that is None was not given."""
    given = {name: value for name, value in flags.items() if value is not None}
    return Source("flag", given, _spell_flag)


def keyword_source(keywords: Mapping[str, Any]) -> Source:
    """Return the settings among keyword arguments; None leaves a setting to the other sources."""
    given = {name: value for name, value in keywords.items() if value is not None}
    return Source("keyword", given, lambda name, value: name)


def checked(kind: type, name: str, value: Any) -> Any:
    """Convert `value`, from any source, to the type of the field `name` of `kind`, and check the field's rule.

    Raises:
        ConfigError: "{name} must be {what}, not {value}".
    """
    hint, rule = _type_of(kind, name), settings_of(kind)[name].metadata.get("rule")
    what = rule.what if rule else _describe(hint)
    try:
        converted = convert(value, hint)
    except (ValueError, TypeError):
        if what.startswith(("at least", "from")):
            what = f"{_describe(hint)} {'of ' if what.startswith('at least') else ''}{what}"
        if isinstance(value, str | os.PathLike) and not _can_be_sent(os.fspath(value)):
            what = "text in UTF-8 without NUL"
        quotes = " (put it in quotes)" if _base(hint) is str and isinstance(value, int | float) else ""
        raise ConfigError(f"{name} must be {what}, not {MASK if is_secret(name) else _shown(value)}{quotes}") from None
    if converted is not None and rule and not rule.holds(converted):
        raise ConfigError(f"{name} must be {what}, not {MASK if is_secret(name) else _shown(value)}")
    return converted


def is_secret(name: str) -> bool:
    """Return whether the values of a setting must not be printed."""
    return name.endswith(("_key", "_password", "_store"))  # the URL of a store may have a password


def convert(value: Any, hint: Any) -> Any:
    """Convert `value` to the type `hint`.

    Text becomes a number, true or false (also yes, no, on, off, 1, 0), a size, a list (a,b), a mapping (a=4,b=0.5) or,
    if the setting is optional, None ("none", "null" or ""). numpy numbers and paths are accepted. Nothing else is
    converted: the number 2024 is not accepted as text, nor true as a number.

    Raises:
        ValueError: `value` is of another type.
    """
    value = os.fspath(value) if isinstance(value, os.PathLike) else _plain(value)
    if _is_optional(hint) and (
        value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", ""))
    ):
        return None
    base = _base(hint)
    if base is Size:
        return parse_size(value)
    if base is bool and type(value) is int:
        value = str(value)
    if isinstance(value, str):
        value = _from_text(value, base)
    elif isinstance(value, bool) and base in (int, float):
        raise ValueError("a boolean is not a number")
    elif base is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not _can_be_sent(value):
        raise ValueError("text that no message or system call can carry")
    converted = msgspec.convert(value, base, strict=not isinstance(value, str | dict | list))
    if isinstance(converted, float) and math.isnan(converted):
        raise ValueError("not a number")
    if isinstance(converted, int) and abs(converted) > _LARGEST:
        raise ValueError("too large for a message")
    return converted


def _plain(value: Any) -> Any:
    """Convert numpy numbers and arrays to Python's, including those in a mapping."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _can_be_sent(value: Any) -> bool:
    """Return whether all text in `value` is valid Unicode without NUL, as messages and system calls need it."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
    return all(map(_can_be_sent, value)) if isinstance(value, list | tuple | Mapping) else True


def parse_size(value: str | int, name: str = "size") -> int:
    """Return the bytes of "4GiB", "500MB", "1.5G" or a plain number. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper(), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS and len(match[1]) < 20 else 0
    if isinstance(value, bool) or not 0 < size <= _LARGEST:
        raise ConfigError(f"{name} must be a size such as 4GiB or 500MB, not {_shown(value)}")
    return size


def format_value(kind: type, name: str, value: Any) -> str:
    """Return a setting's value as text that `convert` understands."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={number:g}" for key, number in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if _base(_type_of(kind, name)) is Size:
        unit = next(unit for unit in ("TI", "GI", "MI", "KI", "") if value % _UNITS[unit] == 0)
        return f"{value // _UNITS[unit]}{unit.replace('I', 'iB')}"
    return str(value)


def metavar(kind: type, name: str) -> str:
    """Return the placeholder for a flag's value in help texts, such as INTEGER."""
    base = _base(_type_of(kind, name))
    names = {int: "INTEGER", float: "NUMBER", Size: "SIZE", str: "TEXT"}
    return names.get(base, "TEXT")


def is_boolean(kind: type, name: str) -> bool:
    return _base(_type_of(kind, name)) is bool


def default_of(kind: type, name: str) -> Any:
    f = settings_of(kind)[name]
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def settings_of(kind: Any) -> "Mapping[str, dataclasses.Field[Any]]":
    """Return the fields of a class of settings by name."""
    return {f.name: f for f in dataclasses.fields(kind)}


class _Notes:
    """Collects the notes on foreign spellings, and joins them to one line."""

    def __init__(self) -> None:
        self._understood: list[str] = []
        self._ignored: list[str] = []

    def add(self, spelling: str, value: Any, reading: Reading) -> None:
        if reading.note:
            given = spelling if isinstance(value, bool) else f"{spelling} {_shown(value).strip(chr(39))}"
            (self._ignored if reading.ignored else self._understood).append(f"{given} {reading.note}")

    def lines(self) -> Iterator[str]:
        parts = [*self._understood]
        if self._ignored:
            parts.append("ignored: " + ", ".join(self._ignored))
        if parts:
            yield "vLLM's settings: " + "; ".join(parts)


def _spell_flag(name: str, value: Any) -> str:
    return ("--no-" if value is False else "--") + name.replace("_", "-")


def _report_unknown(key: str, source: Source, known: Sequence[str], warnings: list[str], hint: bool) -> None:
    name = key.replace("-", "_")
    close = difflib.get_close_matches(name, known, 1, cutoff=0.6 if hint else 0.8)
    if source.kind == "environment":
        if close:
            warnings.append(f"{source.spell(name, '')} is not a setting; did you mean {source.spell(close[0], '')}?")
        elif hint:
            warnings.append(f"{source.spell(name, '')} is not a setting; octavo config lists all settings")
        return
    advice = f"did you mean {close[0]}?" if close else "octavo config lists all settings"
    raise ConfigError(f"{source.where}unknown setting {key!r}: {advice}")


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _type_of(kind: type, name: str) -> Any:
    return _hints(kind)[name]


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (UnionType, Union) and NoneType in get_args(hint)


def _base(hint: Any) -> Any:
    """Return `X` of `X | None`."""
    if not _is_optional(hint):
        return hint
    [base] = [kind for kind in get_args(hint) if kind is not NoneType]
    return base


def _describe(hint: Any) -> str:
    base = _base(hint)
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        Size: "a size such as 4GiB or 500MB",
    }
    return names.get(base, "pairs such as a=1,b=2" if get_origin(base) is dict else "a list such as a,b")


def _from_text(text: str, base: Any) -> Any:
    """Parse text into a value that `msgspec.convert` can convert to the type `base`."""
    if base is str:
        return text
    text = text.strip()
    if base is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError("neither true nor false")
        return _BOOLEANS[text.lower()]
    if base is int and (match := re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG])", text, re.ASCII)):
        return int(float(match[1]) * _COUNTS[match[2]])
    if base is int and re.fullmatch(r".*[bBiI]", text):
        return parse_size(text)
    if get_origin(base) not in (dict, list, tuple):
        return text
    if text.startswith(("{", "[")):
        return json.loads(text)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(base) is not dict:
        return parts
    pairs = [part.partition("=") for part in parts]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise ValueError("not of the form name=value")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shown(value: Any) -> str:
    text = (
        {True: "true", False: "false", None: "none"}[value] if value is None or isinstance(value, bool) else repr(value)
    )
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"

"""Frozen dataclasses as configuration: from flags, from TOML, and back.

A config is a frozen dataclass, possibly of groups that are frozen dataclasses themselves; a string
under each field is its help.  Fields are bool, int, float, str, Path, Literal, tuples of those, and
unions with None.  Standard library until a function runs, so listing verbs stay fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bksdm_tune.artifacts import write_text_atomic
from bksdm_tune.errors import UsageError

T = TypeVar("T")

CONFIG_FLAG = "--config"
# TOML has no null: this word stands for None where leaving the key out would mean something else.
NONE = "none"
ScheduleName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


def group(kind: type) -> Any:
    """A field whose default is a group with all its own defaults."""
    return dataclasses.field(default_factory=kind)


def check_range(
    flag: str, value: float | None, low: float = -math.inf, high: float = math.inf
) -> None:
    """Both ends are allowed; None, "not set", passes.

    Raises:
        UsageError: naming the flag, the bounds and the value.
    """
    if value is None or (math.isfinite(value) and low <= value <= high):
        return
    if math.isinf(high):
        bounds = "a finite number" if math.isinf(low) else f"{low:g} or more"
    else:
        bounds = f"at most {high:g}" if math.isinf(low) else f"from {low:g} to {high:g}"
    raise UsageError(f"{flag} must be {bounds}; you gave {value:g}.")


def check_positive(flag: str, value: float | None) -> None:
    """As ``check_range``, for a finite number above zero."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{flag} must be greater than 0; you gave {value:g}.")


def load_toml(path: Path, cls: type[T]) -> T:
    """An instance of dataclass ``cls``; keys that the file leaves out take the field's default.

    Raises:
        UsageError: the file cannot be read, is not TOML, or has an unknown key or a wrong value.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    try:
        return _from_table(cls, table, "", _leaves(cls))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def save_toml(path: Path, config: Any) -> None:
    """Write a dataclass such that ``load_toml`` gives back an equal one."""
    import tomli_w

    write_text_atomic(path, tomli_w.dumps(_to_table(config)))


def parse(cls: type[T], argv: list[str], prog: str, description: str | None = None) -> T:
    """``cls`` from flags; ``--config FILE.toml`` gives the defaults which flags override.

    Raises:
        UsageError: the config file is missing or wrong.
        SystemExit: 0 after ``--help``, 2 on wrong flags.
    """
    import tyro

    path, flags = _split_config(argv)
    text = (description or cls.__doc__ or "").strip()
    return tyro.cli(
        cls,
        args=flags,
        default=tyro.MISSING_NONPROP if path is None else load_toml(path, cls),
        prog=prog,
        description=f"{text}\n\n{CONFIG_FLAG} FILE.toml: defaults that flags override.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )


def _split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    paths: list[str] = []
    flags: list[str] = []
    words = iter(argv)
    for word in words:
        if word == CONFIG_FLAG:
            paths.append(next(words, ""))
        elif word.startswith(f"{CONFIG_FLAG}="):
            paths.append(word.partition("=")[2])
        else:
            flags.append(word)
    if not paths:
        return None, flags
    if len(paths) > 1 or not paths[0]:
        raise UsageError(f"{CONFIG_FLAG} takes one file, once: {CONFIG_FLAG} FILE.toml.")
    return Path(paths[0]), flags


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _kinds(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _leaves(cls: type, prefix: str = "") -> dict[str, str]:
    """Name of each field -> its dotted key; flags drop the prefix, so names are unique."""
    found: dict[str, str] = {}
    for name, kind in _kinds(cls).items():
        key = prefix + name
        found |= _leaves(kind, f"{key}.") if _is_group(kind) else {name: key}
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _from_table(cls: type[T], table: dict[str, Any], prefix: str, leaves: dict[str, str]) -> T:
    assert dataclasses.is_dataclass(cls)
    kinds = _kinds(cls)
    for name in table.keys() - kinds.keys():
        raise UsageError(f"unknown key {prefix}{name}.{_suggestion(name, leaves)}")
    values = {}
    for field in dataclasses.fields(cls):
        key, default = prefix + field.name, _default(field)
        if field.name in table:
            value, kind = table[field.name], kinds[field.name]
            said_none = value == NONE and default is not None and NoneType in get_args(kind)
            values[field.name] = None if said_none else _read(kind, value, key, leaves)
        elif default is dataclasses.MISSING:
            raise UsageError(f"{key} is missing: add {key} = {_describe(kinds[field.name])}.")
    return cls(**values)


def _suggestion(name: str, leaves: dict[str, str]) -> str:
    close = difflib.get_close_matches(name, leaves, n=1)
    return f" Did you mean {leaves[close[0]]}?" if close else ""


def _read(kind: Any, value: Any, key: str, leaves: dict[str, str]) -> Any:
    """``value`` as TOML gave it -> an instance of ``kind``."""
    if _is_group(kind) and isinstance(value, dict):
        return _from_table(kind, value, f"{key}.", leaves)
    for candidate in _candidates(kind, value, key, leaves):
        return candidate
    raise UsageError(f"{key} must be {_describe(kind)}; you gave {value!r}.")


def _candidates(kind: Any, value: Any, key: str, leaves: dict[str, str]) -> Iterator[Any]:
    """The readings of ``value`` that fit ``kind``, best first."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for member in arguments:
            with contextlib.suppress(UsageError):
                yield _read(member, value, key, leaves)
    elif origin is Literal:
        yield from (a for a in arguments if a == value and type(a) is type(value))
    elif origin is tuple and isinstance(value, list):
        yield from _tuples(arguments, value, key, leaves)
    elif kind is Path and isinstance(value, str):
        yield Path(value)
    elif kind is float and type(value) is int:
        yield float(value)
    elif type(value) is kind:  # not isinstance: true is no integer
        yield value


def _tuples(kinds: Any, value: list[Any], key: str, leaves: dict[str, str]) -> Iterator[Any]:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) == len(value):
        pairs = zip(kinds, value, strict=True)
        yield tuple(_read(k, v, f"{key}[{i}]", leaves) for i, (k, v) in enumerate(pairs))


def _describe(kind: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number"}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_describe(a) for a in arguments if a is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        return f"an array of {_describe(arguments[0])}"
    if _is_group(kind):
        return "a table"
    return names.get(kind, "a string")


def _to_table(config: Any) -> dict[str, Any]:
    table = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            table[field.name] = _plain(value)
        elif _default(field) is not None:
            table[field.name] = NONE
    return table


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _to_table(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

"""The list of pictures that a score is computed from: JSONL, a picture a line, paths beside it.

Roles: ``reference`` (the subject's photos), ``generated``, ``class_prior`` (the plain class, after
tuning).  Whoever made the pictures, this is all that the scorer knows of them.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from bksdm_tune.artifacts import write_text_atomic
from bksdm_tune.errors import DataError
from subjects.catalogue import fill

GROUPS = ("object", "live")
TEMPLATE = re.compile(r"(?:[^{}]|\{0\}|\{1\})*")
MOST = {"seed": 2**64 - 1, "sample_idx": 2**31 - 1}


@dataclass(frozen=True)
class Row:
    """One picture; ``path`` is relative to the manifest's folder, with forward slashes."""

    role: ClassVar[str]
    subject_id: str
    path: str

    @property
    def key(self) -> tuple[Any, ...]:
        """Sorts the rows of a role; two rows of one key are one too many."""
        return (self.subject_id, self.path)


@dataclass(frozen=True)
class Reference(Row):
    """A photo of the subject."""

    role: ClassVar[str] = "reference"


@dataclass(frozen=True)
class Generated(Row):
    """A picture drawn for a prompt; the template as in DreamBooth: ``a {0} {1} in the snow``."""

    role: ClassVar[str] = "generated"
    prompt_id: str
    prompt_template: str
    class_noun: str
    identifier: str
    group: str
    seed: int
    sample_idx: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.subject_id, self.prompt_id, self.seed, self.sample_idx)

    @property
    def clip_text(self) -> str:
        """What the picture is held against: the prompt without the identifier."""
        return fill(self.prompt_template, "", self.class_noun)


@dataclass(frozen=True)
class ClassPrior(Row):
    """A picture of the plain class, drawn by the tuned model."""

    role: ClassVar[str] = "class_prior"
    class_noun: str
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.subject_id, self.class_noun, self.seed)


KINDS: dict[str, type[Row]] = {kind.role: kind for kind in (Reference, Generated, ClassPrior)}


@dataclass(frozen=True)
class Missing:
    """A picture or cell that is not there; ``line`` of the manifest, if it has one."""

    what: str
    line: int | None = None

    def __str__(self) -> str:
        return self.what if self.line is None else f"line {self.line}: {self.what}"


@dataclass(frozen=True)
class Pictures:
    """The rows of a manifest, sorted, and what is missing of them."""

    folder: Path
    references: tuple[Reference, ...]
    generated: tuple[Generated, ...]
    class_prior: tuple[ClassPrior, ...]
    missing: tuple[Missing, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        return (*self.references, *self.generated, *self.class_prior)

    @property
    def exclusions(self) -> list[str]:
        """Whatever the order of the manifest's lines."""
        return sorted(missing.what for missing in self.missing)


def write_rows(path: Path, rows: list[Row]) -> None:
    lines = [json.dumps({"role": row.role} | asdict(row), sort_keys=True) for row in rows]
    write_text_atomic(path, "\n".join(lines) + "\n")


def read_pictures(path: Path, check: Callable[[Path], object]) -> Pictures:
    """All rows of a manifest, each picture looked at with ``check``, which raises DataError saying
    what is wrong, without the path.

    Pictures that are not there or not whole, and cells without pictures, become ``missing``;
    missing photos do not, since every score rests on them.

    Raises:
        DataError: one report of every bad line, with its number.
    """
    numbered, problems = _parse(path)
    problems += _duplicates(numbered)
    kept: list[Row] = []
    missing: list[Missing] = []
    for number, row in numbered:
        if _outside(path.parent, row.path):
            problems.append(f"line {number}: {row.path} leads out of the manifest's folder")
        elif fault := _fault(path.parent, row.path, check):
            if isinstance(row, Reference):
                problems.append(f"line {number}: {fault}")
            else:
                missing.append(Missing(fault, number))
        else:
            kept.append(row)
    problems += _subjects(numbered)
    if problems:
        shown = "\n  ".join(problems)
        raise DataError(f"{path} has {len(problems)} faults:\n  {shown}")
    of = {role: sorted((r for r in kept if r.role == role), key=lambda r: r.key) for role in KINDS}
    missing += _holes(numbered)
    if not of["generated"]:
        raise DataError(f"{path}: none of its generated pictures is there.")
    return Pictures(
        path.parent,
        tuple(of["reference"]),  # type: ignore[arg-type]
        tuple(of["generated"]),  # type: ignore[arg-type]
        tuple(of["class_prior"]),  # type: ignore[arg-type]
        tuple(missing),
    )


def _parse(path: Path) -> tuple[list[tuple[int, Row]], list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would break JSON strings
        if not line.strip():
            continue
        try:
            rows.append((number, parse_row(json.loads(line))))
        except (ValueError, DataError) as error:
            problems.append(f"line {number}: {error}")
        except RecursionError:
            problems.append(f"line {number}: is nested too deeply")
    return rows, problems


def parse_row(facts: Any) -> Row:
    """
    Raises:
        DataError: what is wrong with it.
    """
    if not isinstance(facts, dict):
        raise DataError("is no JSON object")
    role = facts.get("role")
    kind = KINDS.get(role) if isinstance(role, str) else None
    if kind is None:
        raise DataError(f"role is {role!r}, not one of {', '.join(KINDS)}")
    values = {name: value for name, value in facts.items() if name != "role"}
    if type(values.get("prompt_id")) is int:
        values["prompt_id"] = str(values["prompt_id"])
    wanted = {field.name: field for field in fields(kind)}
    if unknown := sorted(values.keys() - wanted.keys()):
        raise DataError(f"a {kind.role} row has no field {', '.join(unknown)}")
    if lacking := [n for n, f in wanted.items() if n not in values and f.default is MISSING]:
        raise DataError(f"a {kind.role} row needs {', '.join(lacking)}")
    for name, value in values.items():
        _check_value(name, value, str(wanted[name].type))
    values["path"] = PurePosixPath(values["path"]).as_posix()  # ./a and a//b are a and a/b
    return kind(**values)


def _check_value(name: str, value: Any, kind: str) -> None:
    if type(value).__name__ != kind:
        raise DataError(f"{name} is {value!r}; it must be {'a text' if kind == 'str' else kind}")
    if isinstance(value, str) and ("\0" in value or not _encodes(value)):
        raise DataError(f"{name} is {value!r}, which is no proper text")
    if name in MOST and not 0 <= value <= MOST[name]:
        raise DataError(f"{name} is {value}; it must be from 0 to {MOST[name]}")
    if name == "group" and value not in GROUPS:
        raise DataError(f"group is {value!r}, not one of {', '.join(GROUPS)}")
    if name in ("subject_id", "path", "prompt_id", "class_noun") and not value.strip():
        raise DataError(f"{name} is empty")
    if name == "prompt_template":
        if not TEMPLATE.fullmatch(value):
            raise DataError(
                f"prompt_template {value!r} is none: {{0}} is the identifier, {{1}} the class noun"
            )
        if "{1}" not in value:
            raise DataError(f"prompt_template {value!r} does not name the class noun, {{1}}")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _duplicates(numbered: list[tuple[int, Row]]) -> list[str]:
    first: dict[tuple[Any, ...], int] = {}
    problems = []
    for number, row in numbered:
        key = (row.role, *row.key)
        if key in first:
            same = ", ".join(map(str, row.key))
            problems.append(f"line {number}: the same {row.role} as line {first[key]} ({same})")
        first.setdefault(key, number)
    return problems


def _outside(folder: Path, path: str) -> bool:
    if Path(path).is_absolute():
        return True
    try:
        return not (folder / path).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a name too long, links in a circle: _fault says so
        return False


def _fault(folder: Path, path: str, check: Callable[[Path], object]) -> str | None:
    try:
        if not (folder / path).is_file():
            return f"{path} is not there"
    except (OSError, RuntimeError) as error:
        return f"{path[:80]} cannot be opened: {error}"
    try:
        check(folder / path)
    except DataError as error:
        return f"{path} {error}"
    return None


def _subjects(numbered: list[tuple[int, Row]]) -> list[str]:
    rows = [row for _, row in numbered]
    known = {row.subject_id for row in rows if isinstance(row, Reference)}
    problems, told = [], set()
    facts: dict[str, tuple[str, str]] = {}
    templates: dict[tuple[str, str], str] = {}
    for number, row in numbered:
        name = row.subject_id
        if name not in known and name not in told:
            told.add(name)
            problems.append(f"line {number}: subject {name} has no reference photo")
        if isinstance(row, Generated):
            mine = (row.class_noun, row.group)
            if facts.setdefault(name, mine) != mine:
                problems.append(
                    f"line {number}: {name} is {', '.join(mine)} here and {', '.join(facts[name])} "
                    "above"
                )
            place = (row.group, row.prompt_id)
            if templates.setdefault(place, row.prompt_template) != row.prompt_template:
                problems.append(
                    f"line {number}: prompt {row.prompt_id} is {row.prompt_template!r} here and "
                    f"{templates[place]!r} above"
                )
    if not any(isinstance(row, Generated) for row in rows):
        problems.append("there is no generated row: nothing to score")
    return problems


def _holes(numbered: list[tuple[int, Row]]) -> list[Missing]:
    """Cells with fewer pictures than the others, by the subject's first line: every subject has
    every prompt of its group, and as much of the plain class as the others."""
    first: dict[str, int] = {}
    for number, row in numbered:
        first.setdefault(row.subject_id, number)
    rows = [row for _, row in numbered]
    generated = [row for row in rows if isinstance(row, Generated)]
    count = Counter((row.subject_id, row.prompt_id) for row in generated)
    plain = Counter(row.subject_id for row in rows if isinstance(row, ClassPrior))
    prompts: dict[str, set[str]] = defaultdict(set)
    groups = {row.subject_id: row.group for row in generated}
    for row in generated:
        prompts[row.group].add(row.prompt_id)
    most, most_plain = max(count.values(), default=0), max(plain.values(), default=0)
    holes = [(s, "no generated picture") for s in sorted(first.keys() - groups.keys())]
    for subject, group in sorted(groups.items()):
        for prompt in sorted(prompts[group]):
            if (there := count[subject, prompt]) < most:
                holes.append((subject, f"{there} of {most} pictures of prompt {prompt}"))
        if plain[subject] < most_plain:
            holes.append((subject, f"{plain[subject]} of {most_plain} pictures of the class"))
    return [Missing(f"subject {subject}: {what}", first[subject]) for subject, what in holes]

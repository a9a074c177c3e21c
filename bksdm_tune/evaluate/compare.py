"""``bksdm-tune compare A B``: the difference of two results of one protocol, paired by picture."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from bksdm_tune.config import parse
from bksdm_tune.errors import DataError, ProtocolError
from bksdm_tune.evaluate import subject_scores
from bksdm_tune.evaluate.results import IMAGES, POCKET_NOTE, SUBJECTS, read_results, read_rows
from bksdm_tune.evaluate.statistics import bootstrap_cells, bootstrap_mean, holm, sign_flip
from bksdm_tune.evaluate.subject_scores import MEASURES, Table

KEY = ("role", "subject_id", "prompt_id", "seed", "sample_idx")


@dataclass(frozen=True)
class Config:
    """Print B minus A for every metric, with intervals from the pictures both have."""

    a: Positional[Path]
    """Folder with results.json, or the file."""
    b: Positional[Path]
    """The other."""
    json: bool = False
    """Print JSON."""


def check_alike(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Raise ProtocolError, naming what differs, unless both were measured in the same way."""
    if a["kind"] != b["kind"]:
        raise ProtocolError(f"One scores a {a['kind']}, the other a {b['kind']}.")
    if a["fingerprint"] == b["fingerprint"]:
        return
    names = sorted(a["protocol"].keys() | b["protocol"].keys())
    differing = [
        f"{name} ({a['protocol'].get(name)} and {b['protocol'].get(name)})"
        for name in names
        if a["protocol"].get(name) != b["protocol"].get(name)
    ]
    raise ProtocolError(
        f"These were measured by different protocols, so their difference means nothing: "
        f"{'; '.join(differing)}. Score both in the same way."
    )


def paired(a: dict[str, list[Any]], b: dict[str, list[Any]], name: str) -> np.ndarray:
    """B minus A over the pictures that both have, by key.

    Raises:
        DataError: they have none in common.
    """
    other = dict(zip(b["key"], b[name], strict=True))
    pairs = [(other[k], v) for k, v in zip(a["key"], a[name], strict=True) if k in other]
    if not pairs:
        raise DataError("The two results have no picture in common.")
    return np.array([mine - theirs for mine, theirs in pairs], dtype=np.float64)


def unpaired(
    difference: float, a: list[float] | None, b: list[float] | None
) -> tuple[float, float] | None:
    """Interval of a difference of independent figures; too wide for those that go together."""
    if a is None or b is None:
        return None
    half = float(np.hypot((a[1] - a[0]) / 2, (b[1] - b[0]) / 2))
    return difference - half, difference + half


def compare(first: Path, second: Path) -> dict[str, dict[str, Any]]:
    """Metric -> its two values, the difference, and its interval: from the pictures of both where
    they can be paired, else from the two intervals, as if the two sides were independent.

    Raises:
        ProtocolError: unlike protocols, or distances to different teachers.
        DataError: files that cannot be read.
    """
    a, b = read_results(first), read_results(second)
    check_alike(a, b)
    if a["kind"] == SUBJECTS:
        return compare_subjects((a, b), (first, second))
    rows = read_rows(first), read_rows(second)
    report: dict[str, dict[str, Any]] = {}
    for name, metric in a["metrics"].items():
        values = metric["value"], b["metrics"].get(name, {}).get("value")
        if None in values:
            continue
        others = b["metrics"][name]
        if metric["against"] != others["against"]:
            raise ProtocolError(
                f"Their {name} is relative to different models. Give both evaluations the same "
                "--teacher."
            )
        entry: dict[str, Any] = {
            "a": values[0],
            "b": values[1],
            "difference": values[1] - values[0],
            "ci95": unpaired(values[1] - values[0], metric["ci95"], others["ci95"]),
            "better": metric["better"],
        }
        if all(name in side for side in rows):
            differences = paired(*rows, name)
            entry |= {"difference": float(differences.mean()), "pairs": len(differences)}
            entry["ci95"] = bootstrap_mean(differences)
        report[name] = entry
    return report


def compare_subjects(
    results: tuple[dict[str, Any], dict[str, Any]], paths: tuple[Path, Path]
) -> dict[str, dict[str, Any]]:
    """As ``compare``, for scores of subjects: pictures paired by subject, prompt, seed and sample,
    intervals from subjects and prompts, p by flipping the subjects' signs, Holm over the metrics.
    """
    report: dict[str, dict[str, Any]] = {}
    tables = [table_of(path) for path in paths]
    check_same_pictures(*tables)
    first, second = (_by_key(table) for table in tables)
    networks = {result["protocol"].get("lpips") for result in results}
    for name, measure in MEASURES.items():
        if name == "div" and len(networks) > 1:
            continue
        rows = differences_of(first, second, name)
        if not rows:
            continue
        cells = subject_scores.cells(rows, name)
        p = sign_flip(cells.by_subject())
        report[name] = {
            "a": subject_scores.macro([first[_key(row)] for row in rows], name),
            "b": subject_scores.macro([second[_key(row)] for row in rows], name),
            "difference": float(cells.by_subject().mean()),
            "ci95": bootstrap_cells(cells),
            "p": p,
            "p_holm": None,
            "pairs": len(rows),
            "of": max(len(subject_scores.rows_of(table, name)) for table in tables),
            "subjects": len(cells.values),
            "better": measure.better,
        }
        if p is None:
            report[name]["reason"] = "only one subject"
    known = {name: entry["p"] for name, entry in report.items() if entry["p"] is not None}
    for name, value in holm(known).items():
        report[name]["p_holm"] = value
    if not report:
        raise DataError("The two results have no picture in common.")
    return report


def table_of(path: Path) -> Table:
    """The rows of a result of subjects."""
    columns = read_rows(path, IMAGES)
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def check_same_pictures(a: Table, b: Table) -> None:
    """Raise ProtocolError where the two have other photos of a subject, or mean other prompts."""
    for what, role, key, value in (
        ("photos", "reference", ("subject_id",), ("sha256",)),
        ("prompts", "generated", ("group", "prompt_id"), ("prompt_template",)),
        ("class nouns", "generated", ("subject_id",), ("class_noun",)),
    ):
        sides = []
        for table in (a, b):
            found: dict[Any, set[Any]] = defaultdict(set)
            for row in table:
                if row["role"] == role:
                    found[tuple(row[k] for k in key)].add(tuple(row[v] for v in value))
            sides.append(found)
        unlike = [k for k in sides[0].keys() & sides[1].keys() if sides[0][k] != sides[1][k]]
        if unlike:
            names = ", ".join(sorted("/".join(map(str, k)) for k in unlike)[:5])
            raise ProtocolError(f"The two were scored with other {what} of {names}.")


def _by_key(rows: Table) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {_key(row): row for row in rows if row["role"] != "reference"}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def differences_of(
    a: dict[tuple[Any, ...], dict[str, Any]], b: dict[tuple[Any, ...], dict[str, Any]], name: str
) -> list[dict[str, Any]]:
    """Rows of A whose figure is B's minus A's, where both have one."""
    found = []
    for key in sorted(a.keys() & b.keys(), key=str):
        values = a[key][name], b[key][name]
        if None not in values and a[key]["role"] == MEASURES[name].role:
            found.append(a[key] | {name: values[1] - values[0]})
    return found


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune compare")
    report = compare(config.a, config.b)
    if config.json:
        print(json.dumps(report, indent=2, sort_keys=True))
        return 0
    print(protocol_line(config.a))
    print("| metric | A | B | B - A | 95 % interval | p (Holm) | better |")
    print("|---|---|---|---|---|---|---|")
    for name, entry in report.items():
        interval, p = entry["ci95"], entry.get("p_holm")
        bounds = f"{interval[0]:+.4g} to {interval[1]:+.4g}" if interval else ""
        cells = [f"{entry['a']:.4g}", f"{entry['b']:.4g}", f"{entry['difference']:+.4g}", bounds]
        cells.append("" if p is None else f"{p:.3g}")
        print(f"| {name} | {' | '.join(cells)} | {entry['better']} |")
    for name, entry in report.items():
        if entry.get("pairs", 0) < entry.get("of", 0):
            print(f"{name}: {entry['pairs']} of {entry['of']} pictures are in both.")
        if "reason" in entry:
            print(f"{name}: no interval, {entry['reason']}.")
    return 0


def protocol_line(path: Path) -> str:
    name = read_results(path)["protocol"].get("name")
    note = f" {POCKET_NOTE}" if name == "pocket" else ""
    return f"Protocol {name}.{note}" if name else ""

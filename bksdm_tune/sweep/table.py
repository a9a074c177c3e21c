"""From finished cells to arms: scores over all subjects, differences, a table and a report."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bksdm_tune.artifacts import write_text_atomic
from bksdm_tune.errors import DataError, ProtocolError
from bksdm_tune.evaluate.compare import compare, table_of
from bksdm_tune.evaluate.report import scatter, template
from bksdm_tune.evaluate.results import SCORES, read_results
from bksdm_tune.evaluate.score import summarise, write
from bksdm_tune.evaluate.score_model import UNTUNED
from bksdm_tune.evaluate.subject_scores import Table
from bksdm_tune.sweep.cells import FAILURE, RESULT, Cell

SCORED = ("dino", "clip_i", "clip_t", "pres")
COSTS = ("seconds", "peak_memory_gb", "megabytes", "images_per_second")


def write_tables(out: Path, wanted: list[Cell]) -> str:
    """``arms/``, ``table.md``, ``leaderboard.csv``, ``report.html``; the table."""
    arms: dict[str, list[Cell]] = {}
    for cell in wanted:
        arms.setdefault(cell.arm, []).append(cell)
    seeds = sorted({cell.seed for cell in wanted})
    results = {
        arm: gather(out, arm, members, seeds)
        for arm, members in arms.items()
        if any(cell.done(out) for cell in members)
    }
    rows = [leader(out, arm, result, arms[arm]) for arm, result in results.items()]
    rows.sort(key=lambda row: -row["dino"])
    pairs = differences(out, list(results))
    lost = failures(undone(wanted, out), out)
    text = markdown(rows, pairs, results) + (f"\n{lost}\n" if lost else "")
    write_text_atomic(out / "table.md", text)
    write_text_atomic(out / "leaderboard.csv", as_csv(rows))
    points = [(row["arm"], row["clip_t"], row["dino"]) for row in rows]
    page = template("sweep.html.j2").render(
        rows=rows,
        pairs=pairs,
        results=results,
        lost=lost,
        plot=scatter(points, "each point an arm"),
    )
    write_text_atomic(out / "report.html", page)
    return text


def undone(cells: Iterable[Cell], out: Path) -> list[Cell]:
    return [cell for cell in cells if not cell.done(out)]


def failures(failed: list[Cell], out: Path) -> str:
    """A line a cell that has no result, with the last line of its reason; '' if there is none."""
    if not failed:
        return ""
    lines = [f"{len(failed)} cells failed; the same command tries them again:", ""]
    for cell in failed:
        path = cell.folder(out) / FAILURE
        text = path.read_text().strip().splitlines() if path.is_file() else ["its process died"]
        lines.append(f"* {cell.name}: {text[-1]}")
    return "\n".join(lines)


def gather(out: Path, arm: str, members: list[Cell], seeds: list[int]) -> dict[str, Any]:
    """Scores of an arm over all its subjects, and of its untuned backbone; ``seeds``: of all arms,
    so that equal trainings pair.

    Raises:
        ProtocolError: its cells were scored in different ways.
    """
    done = [cell for cell in members if cell.done(out)]
    missing = [f"cell {cell.name}" for cell in members if not cell.done(out)]
    folder = out / "arms" / arm
    floor: dict[str, Any] | None = None
    for below, title in ((UNTUNED, f"{arm}, untuned"), ("", arm)):
        table: Table = []
        for cell in done:
            table += rows_of(cell.folder(out) / "score" / below, out, seeds.index(cell.seed))
        results = [read_results(cell.folder(out) / "score" / below) for cell in done]
        if len({result["fingerprint"] for result in results}) > 1:
            raise ProtocolError(f"The cells of {arm} were scored by different protocols.")
        protocol, no_div = results[0]["protocol"], results[0]["metrics"]["div"]["reason"]
        table = photos_once(table)
        result = summarise(table, protocol, title, missing, floor, no_div)
        write(folder / below, table, result, out)
        floor = result
    assert floor is not None
    return floor


def rows_of(folder: Path, out: Path, run: int) -> Table:
    """A cell's rows with paths from ``out``; pictures of another training are further samples."""
    rows = table_of(folder)
    samples = 1 + max(row["sample_idx"] or 0 for row in rows)
    for row in rows:
        row["path"] = (folder.relative_to(out) / row["path"]).as_posix()
        if row["role"] == "generated":
            row["sample_idx"] += run * samples
        elif row["role"] == "class_prior":
            row["sample_idx"] = run
    return rows


def photos_once(table: Table) -> Table:
    """Without the photos that several trainings of a subject list."""
    seen: set[tuple[str, str]] = set()
    kept: Table = []
    for row in table:
        photo = (row["subject_id"], row["sha256"])
        if row["role"] == "reference":
            if photo in seen:
                continue
            seen.add(photo)
        kept.append(row)
    return kept


def leader(out: Path, arm: str, result: dict[str, Any], members: list[Cell]) -> dict[str, Any]:
    """A line of the leaderboard: scores, and means of what the cells cost."""
    cells = [
        json.loads((cell.folder(out) / RESULT).read_text()) for cell in members if cell.done(out)
    ]
    row: dict[str, Any] = {"arm": arm, "cells": len(cells), "of": len(members)}
    for name in SCORED:
        metric = result["metrics"][name]
        row[name] = metric["macro"]
        row[f"{name}_low"], row[f"{name}_high"] = metric["ci95"] or (None, None)
    row["floor"] = result["metrics"]["dino"]["floor"]
    row["ceiling"] = (result["metrics"]["dino"]["ceiling"] or {}).get("without_self")
    row["normalised"] = result["metrics"]["dino"]["normalised"]
    row |= {name: float(np.mean([cell[name] for cell in cells])) for name in COSTS}
    drawn = sum(cell["illustrated"] for cell in cells)
    row["photos"] = "illustrated" if drawn == len(cells) else "real" if not drawn else "both kinds"
    return row | {"together": max(cell["trained_together"] for cell in cells)}


def differences(out: Path, arms: list[str]) -> list[dict[str, Any]]:
    """B minus A for arms that differ in the method, or in the backbone, only."""
    found = []
    for a, b in itertools.combinations(arms, 2):
        one, other = a.rsplit("-", 1), b.rsplit("-", 1)
        if (one[0] == other[0]) == (one[1] == other[1]):
            continue
        pair: dict[str, Any] = {"a": a, "b": b, "metrics": {}, "reason": None}
        try:
            report = compare(out / "arms" / a / SCORES, out / "arms" / b / SCORES)
            pair["metrics"] = {name: report[name] for name in SCORED if name in report}
        except (DataError, ProtocolError) as error:  # other photos, or no subject in common
            pair["reason"] = str(error)
        found.append(pair)
    return found


def markdown(
    rows: list[dict[str, Any]], pairs: list[dict[str, Any]], results: dict[str, Any]
) -> str:
    protocol = next(iter(results.values()))["protocol"]["name"] if results else ""
    lines = [
        f"Protocol {protocol}. 95 % intervals: two-way bootstrap over subjects and prompts. "
        "Untuned and photos: DINO's floor and ceiling.",
        "",
        "| arm | cells | of photos | DINO | CLIP-I | CLIP-T | PRES | untuned | photos | normalised "
        "| s | GB | MB | images/s |",
        "|---" * 14 + "|",
    ]
    for row in rows:
        scores = [_with_interval(row[n], row[f"{n}_low"], row[f"{n}_high"]) for n in SCORED]
        rest = [_figure(row[name]) for name in ("floor", "ceiling", "normalised")]
        costs = [f"{row[n]:.3g}" for n in COSTS]
        of = f"{row['cells']} of {row['of']}"
        cells = [row["arm"], of, row["photos"], *scores, *rest, *costs]
        lines.append("| " + " | ".join(cells) + " |")
    if pairs:
        lines += ["", "| B - A | DINO | CLIP-I | CLIP-T | PRES |", "|---" * 5 + "|"]
    for pair in pairs:
        if pair["reason"]:
            lines.append(f"| {pair['b']} - {pair['a']} | not comparable: {pair['reason']} | | | |")
            continue
        entries = [pair["metrics"].get(name) for name in SCORED]
        cells = [_difference(entry) for entry in entries]
        lines.append(f"| {pair['b']} - {pair['a']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _difference(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    interval = entry["ci95"]
    bounds = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
    p = f", p {entry['p_holm']:.2g}" if entry.get("p_holm") is not None else ""
    return f"{entry['difference']:+.3f}{bounds}{p}"


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["arm"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

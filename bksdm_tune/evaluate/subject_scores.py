"""From features to a table with a row a picture, and from that table to every summary.

Averaging (DreamBooth, section 4.1): a picture's score is the mean over the subject's photos; then
means over the pictures of a prompt, over prompts, over subjects.  Nothing here loads a model, and
every summary follows from the table alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm_tune.errors import DataError
from bksdm_tune.evaluate.manifest import ClassPrior, Generated, Pictures, Row
from bksdm_tune.evaluate.statistics import Cells, bootstrap_cells
from subjects.catalogue import prompt_type

Table = list[dict[str, Any]]
COPY_LEVEL = 0.95  # of the similarities between photos of one subject


@dataclass(frozen=True)
class Measure:
    """A figure: the table's column, the role of the rows that have it, which way is better."""

    role: str
    better: str
    over_references: bool
    """Each picture's value is a mean over the subject's photos."""


# fmt: off
MEASURES = {
    "dino":   Measure("generated",   "higher", True),
    "clip_i": Measure("generated",   "higher", True),
    "clip_t": Measure("generated",   "higher", False),
    "pres":   Measure("class_prior", "lower",  True),
    "div":    Measure("generated",   "higher", False),
}
# fmt: on
COLUMNS = (
    "role",
    "subject_id",
    "path",
    "sha256",
    "prompt_id",
    "prompt_template",
    "clip_text",
    "class_noun",
    "identifier",
    "group",
    "seed",
    "sample_idx",
    "references",
    *MEASURES,
    "nearest",
    "black",
    "copied",
)  # fmt: skip


def unit(features: NDArray[Any]) -> NDArray[np.float64]:
    """Rows of length 1 in float64.

    Raises:
        DataError: some are not finite, or nothing.
    """
    rows = features.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise DataError("An encoder answers with numbers that are not finite, or with zeros.")
    return np.asarray(rows / lengths)


def table(
    pictures: Pictures,
    dino: dict[str, NDArray[Any]],
    clip: dict[str, NDArray[Any]],
    texts: dict[str, NDArray[Any]],
    facts: dict[str, dict[str, Any]],
    div: dict[str, float],
) -> Table:
    """``dino``, ``clip``: path -> unit row; ``texts``: clip_text -> unit row; ``facts``: path ->
    sha256 and black; ``div``: path -> mean LPIPS to the other pictures of its prompt."""
    photos: dict[str, list[str]] = defaultdict(list)
    for reference in pictures.references:
        photos[reference.subject_id].append(reference.path)
    sides = {
        name: {s: np.stack([space[p] for p in paths]) for s, paths in photos.items()}
        for name, space in (("dino", dino), ("clip_i", clip))
    }
    near = copy_threshold(sides["dino"])
    rows = []
    for row in pictures.rows:
        own = photos[row.subject_id]
        cosines = {
            "dino": sides["dino"][row.subject_id] @ dino[row.path],
            "clip_i": sides["clip_i"][row.subject_id] @ clip[row.path],
        }
        line: dict[str, Any] = dict.fromkeys(COLUMNS)
        line |= _plain(row) | facts[row.path] | {"references": len(own), "copied": False}
        if row.role == "reference":
            line |= {
                name: _to_others(values, own.index(row.path)) for name, values in cosines.items()
            }
        elif isinstance(row, Generated):
            line |= {name: float(values.mean()) for name, values in cosines.items()}
            line["clip_text"] = row.clip_text
            line["clip_t"] = float(texts[row.clip_text] @ clip[row.path])
            line["div"] = div.get(row.path)
            line["nearest"] = float(cosines["dino"].max())
            line["copied"] = near is not None and line["nearest"] > near
        elif isinstance(row, ClassPrior):
            line["pres"] = float(cosines["dino"].mean())
        rows.append(line)
    return rows


def _plain(row: Row) -> dict[str, Any]:
    return {"role": row.role} | {n: getattr(row, n) for n in COLUMNS if n in vars(row)}


def _to_others(cosines: NDArray[Any], place: int) -> float | None:
    others = np.delete(cosines, place)
    return float(others.mean()) if len(others) else None


def copy_threshold(photos: dict[str, NDArray[Any]]) -> float | None:
    """The 95th percentile of DINO similarities between photos of one subject; nearer than that to
    a photo, a picture is taken for its copy.  None where no subject has two photos."""
    pairs = [side @ side.T for side in photos.values()]
    values = np.concatenate([p[np.triu_indices(len(p), 1)] for p in pairs])
    return float(np.quantile(values, COPY_LEVEL)) if len(values) else None


def rows_of(rows: Table, name: str) -> Table:
    return [r for r in rows if r["role"] == MEASURES[name].role and r[name] is not None]


def cell_means(rows: Table, name: str) -> dict[tuple[str, str], float]:
    """(subject, prompt) -> mean over its pictures; of the plain class the seed is the prompt."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        column = row["prompt_id"] if row["role"] == "generated" else str(row["seed"])
        values[row["subject_id"], column].append(row[name])
    return {key: float(np.mean(part)) for key, part in values.items()}


def lists_of(rows: Table) -> dict[str, str]:
    """Subject -> which list of prompts (of the plain class: of seeds) it has."""
    return {r["subject_id"]: r["group"] or r["class_noun"] for r in rows}


def cells(rows: Table, name: str) -> Cells:
    return Cells.of(cell_means(rows, name), lists_of(rows))


def by_subject(rows: Table, name: str) -> dict[str, float]:
    means: dict[str, list[float]] = defaultdict(list)
    for (subject, _), value in cell_means(rows, name).items():
        means[subject].append(value)
    return {subject: float(np.mean(values)) for subject, values in sorted(means.items())}


def macro(rows: Table, name: str) -> float:
    return float(np.mean(list(by_subject(rows, name).values())))


def ceiling(rows: Table, name: str) -> dict[str, float] | None:
    """Photos of a subject against each other, mean over subjects with two or more: without the
    pairs of a photo with itself, and with them (cosine 1), as some published figures have it."""
    if name not in ("dino", "clip_i"):
        return None
    apart: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["role"] == "reference" and row[name] is not None:
            apart[row["subject_id"]].append(row[name])
    if not apart:
        return None
    without = [float(np.mean(values)) for values in apart.values()]
    counts = [len(values) for values in apart.values()]
    within = [(value * (n - 1) + 1) / n for value, n in zip(without, counts, strict=True)]
    return {"without_self": float(np.mean(without)), "with_self": float(np.mean(within))}


def summary(rows: Table, name: str, reason: str | None) -> dict[str, Any]:
    """One metric; all None, with ``reason``, where nothing was measured."""
    mine = rows_of(rows, name)
    found: dict[str, Any] = {
        "better": MEASURES[name].better, "reason": None, "ceiling": ceiling(rows, name),
        "floor": None, "normalised": None,
    }  # fmt: skip
    if not mine:
        nothing = dict.fromkeys(("macro", "image_mean", "pair_micro", "ci95"))
        return found | nothing | {"reason": reason or "no pictures of this kind"}
    values = np.array([row[name] for row in mine])
    weights = [row["references"] if MEASURES[name].over_references else 1 for row in mine]
    interval = bootstrap_cells(cells(mine, name))
    return found | {
        "macro": macro(mine, name),
        "image_mean": float(values.mean()),
        "pair_micro": float(np.average(values, weights=weights)),
        "ci95": list(interval) if interval else None,
        "ci95_reason": None if interval else "only one subject",
    }


def with_floor(metric: dict[str, Any], floor: float | None) -> dict[str, Any]:
    """``floor``: the untuned backbone's macro; normalised: 0 at the floor, 1 at the ceiling."""
    top, value = metric["ceiling"], metric["macro"]
    if floor is None or top is None or value is None:
        return metric | {"floor": floor}
    room = top["without_self"] - floor
    return metric | {"floor": floor, "normalised": (value - floor) / room if room > 0 else None}


def per(rows: Table, key: Iterable[str], names: Iterable[str]) -> dict[str, Any]:
    """Metrics of each part of the generated rows that share the ``key`` columns, joined by /."""
    parts: dict[str, Table] = defaultdict(list)
    columns = tuple(key)
    for row in rows:
        if row["role"] == "generated":
            parts["/".join(str(row[c]) for c in columns)].append(row)
    return {
        part: {
            name: macro(rows_of(mine, name), name) if rows_of(mine, name) else None
            for name in names
        }
        | {"images": len(mine)}
        for part, mine in sorted(parts.items())
    }


def with_types(rows: Table) -> Table:
    """The table with a column ``type``: scene, outfit, look, other."""
    return [
        row | {"type": prompt_type(row["prompt_template"]) if row["prompt_template"] else None}
        for row in rows
    ]

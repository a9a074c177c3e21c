"""The one shape of results: what was measured, by which protocol, on how much, how surely.

``results.json`` beside ``rows.parquet``, from whose rows each mean can be computed again.  Two
results may be compared only if their protocols' fingerprints are equal.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import content_key, versions, write_text_atomic
from bksdm_tune.errors import DataError

SCHEMA, SCORES_SCHEMA = "bksdm-tune/results/1", "bksdm-tune/scores/1"
FILE, ROWS = "results.json", "rows.parquet"
SCORES, IMAGES, SUBJECTS = "scores.json", "images.parquet", "subjects"  # score.py

POCKET_NOTE = (
    "Scored by the pocket encoders, which know this program's illustrated world only: compare "
    "these figures with each other, never with published ones."
)


@dataclass(frozen=True)
class Metric:
    """``value`` None says that it was not measured, and ``reason`` why."""

    value: float | None
    ci95: tuple[float, float] | None = None
    better: str = "higher"
    reason: str | None = None
    against: str | None = None
    """Content key of the model it is relative to, if it is."""

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.reason is not None)
        assert self.value is None or math.isfinite(self.value)


def write_results(
    folder: Path,
    kind: str,
    name: str,
    model: str,
    protocol: dict[str, Any],
    counts: dict[str, int],
    metrics: dict[str, Metric],
    rows: dict[str, list[Any]],
) -> Path:
    """Write both files.

    ``model``: content key of all weights measured; ``rows``: columns of equal length, ``key`` among
    them, unique.

    The rows come first, so that a ``results.json`` always has its own.
    """
    import pyarrow
    import pyarrow.parquet

    assert len(set(rows["key"])) == len(rows["key"])
    scratch = folder / f".{ROWS}.tmp"
    pyarrow.parquet.write_table(pyarrow.table(rows), scratch)
    scratch.replace(folder / ROWS)
    result = {
        "schema": SCHEMA,
        "kind": kind,
        "name": name,
        "model": model,
        "protocol": protocol,
        "fingerprint": fingerprint(protocol),
        "counts": counts,
        "metrics": {key: asdict(metric) for key, metric in metrics.items()},
        "versions": versions(),
    }
    text = json.dumps(result, indent=2, sort_keys=True, allow_nan=False)
    write_text_atomic(folder / FILE, text + "\n")
    return folder / FILE


def fingerprint(protocol: dict[str, Any]) -> str:
    """Of all that decides the figures but LPIPS, on which DIV alone rests (compare looks there):
    so two machines compare although one lacks its weights."""
    return content_key({name: value for name, value in protocol.items() if name != "lpips"})


def read_results(path: Path) -> dict[str, Any]:
    """``results.json`` or ``scores.json``, or the folder it lies in.

    Raises:
        DataError: there is none, or it is not one of ours.
    """
    file = path
    if path.is_dir():
        file = next((path / n for n in (FILE, SCORES) if (path / n).is_file()), path / FILE)
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as results: {error}") from None
    known = (SCHEMA, SCORES_SCHEMA)
    if not isinstance(result, dict) or result.get("schema") not in known:
        raise DataError(f"{file} holds no results of this program ({' or '.join(known)}).")
    return result


def read_rows(path: Path, name: str = ROWS) -> dict[str, list[Any]]:
    """The columns of the table beside a result."""
    import pyarrow.parquet

    folder = path if path.is_dir() else path.parent
    try:
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(folder / name).to_pydict()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / name} cannot be read: {error}") from None
    return columns


def table(metrics: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line a metric."""
    lines = ["| metric | value | 95 % interval | better |", "|---|---|---|---|"]
    for name, metric in metrics.items():
        if metric["value"] is None:
            lines.append(f"| {name} | | {metric['reason']} | |")
            continue
        interval = metric["ci95"]
        bounds = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
        lines.append(f"| {name} | {metric['value']:.4g} | {bounds} | {metric['better']} |")
    return "\n".join(lines)

"""Run folders: whose they are while they grow, so that only the same run goes on in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import IDENTITY, MANIFEST, locked, read_manifest, write_text_atomic
from bksdm_tune.checkpoints import list_checkpoints
from bksdm_tune.config import save_toml
from bksdm_tune.errors import DataError, UsageError

OPEN_ENDED = ("constant", "constant_with_warmup")  # schedules that know no last step


def claim(folder: Path, facts: dict[str, Any], config: Any, kind: str, steps: int) -> bool:
    """Make ``folder`` this run's own; True if the run is finished already.

    ``facts`` are all that decides the result beside the number of steps; ``config`` is saved as
    ``config.toml``; ``kind`` is the manifest's.

    Raises:
        UsageError: it holds another run, or something that is no run.
        DataError: it was trained for more steps.
    """
    if not occupy(folder, facts, "run", "another run"):
        reached = max((step for step, _ in list_checkpoints(folder)), default=0)
        if reached > steps:
            raise DataError(
                f"{folder} was trained for {reached} steps, more than --steps {steps}. "
                "Choose another folder with --out."
            )
        if _finished(folder, kind, steps):
            return True
    save_toml(folder / "config.toml", config)
    return False


def occupy(folder: Path, facts: dict[str, Any], noun: str, other: str) -> bool:
    """Note in an empty ``folder`` what it is for; False if it was noted there before.

    ``noun`` says what such a folder is, ``other`` what it holds where the facts differ.

    Raises:
        UsageError: it is for something else, or something else lies there.
    """
    if _noted(folder, facts, noun, other):
        return False
    write_text_atomic(folder / IDENTITY, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return True


def look(folder: Path, facts: dict[str, Any], noun: str, other: str) -> None:
    """Raise UsageError where ``occupy`` would, or while somebody writes there; change nothing."""
    if folder.exists() and _noted(folder, facts, noun, other):
        with locked(folder):
            pass


def _noted(folder: Path, facts: dict[str, Any], noun: str, other: str) -> bool:
    """Whether ``folder`` is for these facts already; if not, it is empty."""
    if not folder.is_dir():
        raise UsageError(f"{folder} cannot be a folder: a file is in its way.")
    identity = folder / IDENTITY
    if identity.is_file():
        theirs = json.loads(identity.read_text())
        if theirs != facts:
            raise UsageError(
                f"{folder} holds {other} ({', '.join(_differences(theirs, facts))} "
                "differ). Choose another folder with --out, or delete this one."
            )
        return True
    strangers = [path.name for path in folder.iterdir() if path.name != ".lock"]
    if strangers:
        raise UsageError(
            f"{folder} is not empty and is no {noun} ({strangers[0]} lies there). "
            "Choose another folder with --out."
        )
    return False


def without_steps(facts: dict[str, Any]) -> dict[str, Any]:
    """A config's facts without the number of steps, where that decides no step before the last:
    so a run can be made longer."""
    training = dict(facts["training"])
    if training["lr_scheduler"] in OPEN_ENDED:
        training.pop("steps")
    return facts | {"training": training}


def seconds_before(folder: Path) -> float:
    """What the steps up to the newest checkpoint took, in the calls before this one."""
    reached = max((step for step, _ in list_checkpoints(folder)), default=0)
    log = folder / "log.jsonl"
    lines = log.read_text("utf-8").splitlines() if log.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return float(sum(row["seconds"] for row in rows if row["step"] <= reached))


def _finished(folder: Path, kind: str, steps: int) -> bool:
    """A finished run with fewer steps than asked for is opened again; its checkpoints go on."""
    if not (folder / MANIFEST).is_file():
        return False
    if read_manifest(folder, kind)["results"]["steps"] == steps:
        return True
    (folder / MANIFEST).unlink()
    return False


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Names of what differs between two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))]
    return [] if a == b else [path]

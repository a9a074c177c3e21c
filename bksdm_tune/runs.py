"""Run folders: whose they are while they grow, so that only the same run goes on in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import MANIFEST, read_manifest, write_text_atomic
from bksdm_tune.config import save_toml
from bksdm_tune.errors import DataError, UsageError

IDENTITY = ".run.json"  # there from the first step on; the manifest only from the last


def claim(folder: Path, facts: dict[str, Any], config: Any, kind: str, steps: int) -> bool:
    """Make ``folder`` this run's own; True if the run is finished already.

    ``facts`` are all that decides the result beside the number of steps; ``config`` is saved as
    ``config.toml``; ``kind`` is the manifest's.

    Raises:
        UsageError: it holds another run, or something that is no run.
    """
    if not occupy(folder, facts, "run", "another run"):
        return _finished(folder, config, kind, steps)
    save_toml(folder / "config.toml", config)
    return False


def occupy(folder: Path, facts: dict[str, Any], noun: str, other: str) -> bool:
    """Note in an empty ``folder`` what it is for; False if it was noted there before.

    ``noun`` says what such a folder is, ``other`` what it holds where the facts differ.

    Raises:
        UsageError: it is for something else, or something else lies there.
    """
    identity = folder / IDENTITY
    if identity.is_file():
        theirs = json.loads(identity.read_text())
        if theirs != facts:
            raise UsageError(
                f"{folder} holds {other} ({', '.join(_differences(theirs, facts))} "
                "differ). Choose another folder with --out, or delete this one."
            )
        return False
    strangers = [path.name for path in folder.iterdir() if path.name != ".lock"]
    if strangers:
        raise UsageError(
            f"{folder} is not empty and is no {noun} ({strangers[0]} lies there). "
            "Choose another folder with --out."
        )
    write_text_atomic(identity, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return True


def _finished(folder: Path, config: Any, kind: str, steps: int) -> bool:
    """A finished run with fewer steps than asked for is opened again; its checkpoints go on."""
    if not (folder / MANIFEST).is_file():
        return False
    done = read_manifest(folder, kind)["results"]["steps"]
    if done > steps:
        raise DataError(
            f"{folder} was trained for {done} steps, more than --steps {steps}. "
            "Choose another folder with --out."
        )
    if done == steps:
        return True
    (folder / MANIFEST).unlink()
    save_toml(folder / "config.toml", config)
    return False


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Names of what differs between two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))]
    return [] if a == b else [path]

"""``bksdm-tune sweep``: the benchmark in one command, resumable, its failures listed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from bksdm_tune.artifacts import locked, write_text_atomic
from bksdm_tune.config import parse, save_toml
from bksdm_tune.runs import occupy
from bksdm_tune.sweep.cells import FAILURE, Cell, Task, cells, tasks
from bksdm_tune.sweep.config import Config
from bksdm_tune.sweep.work import CONFIG, wait_for_others

FAILED = 4
CELLS = "cells.json"
# What may change from one call to the next: who does it, and which cells; more make a folder grow.
FREE = ("engine", "workers", "stack", "data_root", "out")
MORE = ("subjects", "backbones", "methods", "seeds")


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune sweep")
    wanted = cells(config)
    facts = json.loads(json.dumps(asdict(config), default=str))
    with locked(config.out):
        occupy(
            config.out,
            {name: value for name, value in facts.items() if name not in FREE + MORE},
            "sweep",
            "another sweep",
        )
        wait_for_others(config.out)
        save_toml(config.out / CONFIG, config)
        everything = remember(config.out, wanted)
        run(config, wanted)
        failed = [cell for cell in wanted if not cell.done(config.out)]
        from bksdm_tune.sweep.table import write_tables

        print(write_tables(config.out, everything))
    if failed:
        print(failures(failed, config.out))
    print(f"Look at {config.out / 'report.html'}")
    return FAILED if failed else 0


def remember(out: Path, wanted: list[Cell]) -> list[Cell]:
    """All cells that this folder was ever asked for, these included."""
    path = out / CELLS
    before = json.loads(path.read_text()) if path.is_file() else []
    everything = list(dict.fromkeys([*(Cell(**facts) for facts in before), *wanted]))
    write_text_atomic(path, json.dumps([asdict(cell) for cell in everything], indent=1) + "\n")
    return everything


def run(config: Config, wanted: list[Cell]) -> None:
    """Do what is not done; of a stack that failed, each cell again by itself."""
    from tqdm import tqdm

    from bksdm_tune.sweep.engines import ENGINES

    left: list[Task] = [
        task
        for task in tasks(wanted, config.stack)
        if not all(cell.done(config.out) for cell in task)
    ]
    done = sum(cell.done(config.out) for cell in wanted)
    engine = ENGINES[config.engine]
    with tqdm(total=len(wanted), initial=done, desc="cells", unit="cell", disable=None) as bar:
        while left:
            again: list[Task] = []
            for task, ok in engine(left, config.out, config.workers):
                bar.update(sum(cell.done(config.out) for cell in wanted) - bar.n)
                if not ok and len(task) > 1:
                    again += [(cell,) for cell in task if not cell.done(config.out)]
            left = again


def failures(failed: list[Cell], out: Path) -> str:
    lines = [f"{len(failed)} cells failed; the same command tries them again:"]
    for cell in failed:
        path = cell.folder(out) / FAILURE
        text = path.read_text().strip().splitlines() if path.is_file() else ["its process died"]
        lines.append(f"  {cell.name}: {text[-1]}")
    return "\n".join(lines)

"""``bksdm-tune sweep``: the benchmark in one command, resumable, its failures listed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import locked, write_text_atomic
from bksdm_tune.config import load_toml, parse, save_toml
from bksdm_tune.errors import UsageError
from bksdm_tune.resolve import resolve
from bksdm_tune.sweep.cells import Cell, Task, cells, lasting, tasks
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
    for backbone in dict.fromkeys(cell.backbone for cell in wanted):
        resolve(backbone)  # mistyped ones are told before anything starts
    config = placed(config)
    from bksdm_tune.runs import occupy

    with locked(config.out):
        config = replace(config, protocol=settled(config))
        facts = json.loads(json.dumps(asdict(config), default=str))
        occupy(
            config.out,
            {name: value for name, value in facts.items() if name not in FREE + MORE},
            "sweep",
            "another sweep",
        )
        wait_for_others(config.out)
        everything = remember(config.out, wanted)
        save_toml(config.out / CONFIG, config)
        run(config, wanted)
        from bksdm_tune.sweep.table import undone, write_tables

        failed = undone(wanted, config.out)
        print(write_tables(config.out, everything))
    print(f"Look at {config.out / 'report.html'}")
    return FAILED if failed else 0


def placed(config: Config) -> Config:
    """With paths that hold wherever a worker runs.

    Raises:
        UsageError: --data-root is no folder.
    """
    root = config.data_root
    if root is not None and not root.is_dir():
        raise UsageError(f"--data-root {root} is not a folder; give the one above the subjects.")
    return replace(
        config,
        out=config.out.resolve(),
        data_root=root and root.resolve(),
        dino=config.dino and lasting(config.dino),
        clip=config.clip and lasting(config.clip),
    )


def settled(config: Config) -> Any:
    """The protocol of this folder's first call, or the one that can be had now: every cell is
    scored by the same."""
    if config.protocol is not None or config.dino or config.clip:
        return config.protocol
    if (config.out / CONFIG).is_file():
        return load_toml(config.out / CONFIG, Config).protocol
    from bksdm_tune.evaluate.protocols import load_judges

    return load_judges(None, None, None, "cpu").protocol


def remember(out: Path, wanted: list[Cell]) -> list[Cell]:
    """All cells that this folder was ever asked for, these included.

    Raises:
        UsageError: two backbones have one name.
    """
    path = out / CELLS
    before = [Cell(**facts) for facts in json.loads(path.read_text())] if path.is_file() else []
    for cell in wanted:
        if other := next((o for o in before if cell.clash(o)), None):
            raise UsageError(
                f"{cell.arm} is of {other.backbone} here, not of {cell.backbone}. "
                "Choose another folder with --out, or rename one backbone."
            )
    everything = list(dict.fromkeys([*before, *wanted]))
    write_text_atomic(path, json.dumps([asdict(cell) for cell in everything], indent=1) + "\n")
    return everything


def run(config: Config, wanted: list[Cell]) -> None:
    """Do what is not done, in the same stacks as before; of one that failed, each cell alone."""
    from tqdm import tqdm

    from bksdm_tune.sweep.engines import ENGINES
    from bksdm_tune.sweep.table import undone

    left = [task for task in tasks(wanted, config.stack) if undone(task, config.out)]
    done = len(wanted) - len(undone(wanted, config.out))
    engine = ENGINES[config.engine]
    with tqdm(total=len(wanted), initial=done, desc="cells", unit="cell", disable=None) as bar:
        while left:
            again: list[Task] = []
            for task, ok in engine(left, config.out, config.workers):
                bar.update(sum(cell.done(config.out) for cell in wanted) - bar.n)
                if not ok and len(task) > 1:
                    again += [(cell,) for cell in undone(task, config.out)]
            left = again

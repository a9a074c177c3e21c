"""One task: train its cells, draw and score each; what a worker process or a Ray worker runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import MANIFEST, content_key, read_manifest, write_text_atomic
from bksdm_tune.config import load_toml
from bksdm_tune.sweep.cells import FAILURE, RESULT, Cell, Task
from bksdm_tune.sweep.config import Config

CONFIG, WORKERS = "sweep.toml", ".workers"


def do(out: Path, task: Task) -> bool:
    """Whether every cell of the task has its result now; reasons lie in the cells' folders."""
    with alive(out):
        return _do(load_toml(out / CONFIG, Config), out, task)


@contextlib.contextmanager
def alive(out: Path) -> Iterator[None]:
    """Hold the sweep's folder, together with the other workers."""
    with open(out / WORKERS, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def wait_for_others(out: Path) -> None:
    """Until no worker of an earlier call is alive: they end by themselves when it has died."""
    with open(out / WORKERS, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Workers of an earlier call are saving their state.", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)


def _do(config: Config, out: Path, task: Task) -> bool:
    left = [cell for cell in task if not cell.done(out)]
    if not left:
        return True
    for cell in left:
        (cell.folder(out) / FAILURE).unlink(missing_ok=True)
    try:
        train(config, out, task)
    except Exception:
        for cell in left:
            note(cell, out)
        return False
    judges: list[Any] = []
    for cell in left:
        try:
            finish(config, out, cell, judges)
        except Exception:
            note(cell, out)
    return all(cell.done(out) for cell in task)


def note(cell: Cell, out: Path) -> None:
    cell.folder(out).mkdir(parents=True, exist_ok=True)
    write_text_atomic(cell.folder(out) / FAILURE, traceback.format_exc())


def job_of(config: Config, out: Path, cell: Cell) -> Any:
    from bksdm_tune.device import best_device
    from bksdm_tune.dreambooth import config as dreambooth
    from bksdm_tune.dreambooth.job import prepare

    return prepare(
        dreambooth.Config(
            dreambooth.Who(cell.subject, data_root=config.data_root),
            dreambooth.Model(cell.backbone, lora=cell.method == "lora"),
            training=dreambooth.Training(steps=config.steps, seed=cell.seed),
            prior=dreambooth.PriorPreservation(config.prior),
            output=dreambooth.Output(cell.folder(out) / "run", preview_prompts=(), keep=1),
        ),
        best_device(),
    )


def train(config: Config, out: Path, task: Task) -> None:
    """What of the task is not trained: all in a stack where none is, or where theirs is under way,
    else the rest one by one."""
    from bksdm_tune.checkpoints import list_checkpoints
    from bksdm_tune.dreambooth.together import train_together
    from bksdm_tune.dreambooth.train import train as train_alone

    left = [cell for cell in task if not (cell.folder(out) / "run" / MANIFEST).is_file()]
    stack = out / "stacks" / content_key([cell.name for cell in task])[:16]
    if len(task) > 1 and (len(left) == len(task) or list_checkpoints(stack)):
        train_together([job_of(config, out, cell) for cell in task], stack)
    else:
        for cell in left:
            train_alone(job_of(config, out, cell))
    for cell in task:
        for path in (cell.folder(out) / "run").glob("checkpoint-*"):
            shutil.rmtree(path)


def finish(config: Config, out: Path, cell: Cell, judges: list[Any]) -> None:
    """Draw, score, and write the cell's result.  ``judges``: loaded once a task."""
    from bksdm_tune.device import best_device
    from bksdm_tune.evaluate.drawing import SPEED
    from bksdm_tune.evaluate.protocols import load_judges
    from bksdm_tune.evaluate.score_config import Config as Score
    from bksdm_tune.evaluate.score_model import score_model

    device = best_device()
    if not judges:
        judges.append(load_judges(config.protocol, config.dino, config.clip, device))
    folder = cell.folder(out)
    flags = Score(
        str(folder / "run"),
        prompts=config.prompts,
        images=config.images,
        class_images=config.class_images,
    )
    score_model(flags, folder / "score", judges[0], device)
    speed = json.loads((folder / "score" / SPEED).read_text())
    manifest = read_manifest(folder / "run")
    results = manifest["results"]
    facts = asdict(cell) | {
        "seconds": results["seconds"],
        "trained_together": results["trained_together"],
        "illustrated": "illustrated" in manifest["parents"]["photo_source"],
        "peak_memory_gb": results["peak_memory_gb"],
        "megabytes": weights_bytes(folder / "run") / 1e6,
        "images_per_second": speed["pictures"] / speed["seconds"],
    }
    write_text_atomic(folder / RESULT, json.dumps(facts, indent=1, sort_keys=True) + "\n")


def weights_bytes(run: Path) -> int:
    """Of what a subject adds: the adapter, or the tuned models of a full run."""
    adapter = list(run.glob("*.safetensors"))
    parts = [
        path for part in ("unet", "text_encoder") for path in (run / part).glob("*.safetensors")
    ]
    return sum(path.stat().st_size for path in adapter or parts)


def main(argv: list[str]) -> int:
    """``python -m bksdm_tune.sweep.work OUT CELLS-AS-JSON``"""
    task = tuple(Cell(**facts) for facts in json.loads(argv[1]))
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    return 0 if do(Path(argv[0]), task) else 1


def end_with(parent: int) -> None:
    """Stop, as at Ctrl-C, once the process that started this one is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # no time lost taking models apart

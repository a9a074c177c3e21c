"""What distillation is worth, measured on pocket: students with and without it, data, loss terms.

    python scripts/ablation.py --out work/ablation [--only small] [--list]

Every cell trains one student of pocket-teacher with ``bksdm-tune distill`` from one latent cache of
the illustrated world, draws 200 captions, and leaves one JSON file in ``docs/ablation``; the same
command goes on where it stopped.  The world is drawn first where ``work/pocket/data`` is missing.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from bksdm_tune.artifacts import write_text_atomic
from bksdm_tune.cli import main as command
from bksdm_tune.evaluate.results import read_results, read_rows
from bksdm_tune.evaluate.statistics import bootstrap_mean
from scripts.pocket import data, probe
from scripts.pocket.report import captions

STEPS, BATCH, RATE, EMA = 400, 32, 5e-4, 0.99
PICTURES, SMALLER = 20_000, (5_000, 1_000)
CAPTIONS, REAL = 200, 2_000
TASK_ONLY = ("--lambda-out", "0", "--lambda-feat", "0")
DOCS = Path(__file__).resolve().parent.parent / "docs/ablation"


@dataclass(frozen=True)
class Cell:
    """One student: ``name`` says all that sets it apart."""

    group: str
    arm: str
    size: str
    seed: int
    pictures: int = PICTURES
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.group}-{self.size}-{self.arm}-{self.pictures}-seed{self.seed}"

    @property
    def path(self) -> Path:
        """Where its figures are kept."""
        return DOCS / f"{self.name.replace(' ', '_')}.json"


def cells() -> list[Cell]:
    """(a) start x objective, (b) data, (c) loss terms; a cell that two groups need is made once."""
    arms = {
        "inherit+KD": (),
        "inherit+task": TASK_ONLY,
        "random+KD": ("--init", "random"),
        "random+task": ("--init", "random", *TASK_ONLY),
    }
    terms = {
        "no feature": ("--lambda-feat", "0"),
        "no output": ("--lambda-out", "0"),
        "no task": ("--lambda-task", "0"),
    }
    found = [
        Cell("start", arm, "small", seed, flags=flags)
        for seed in range(3)
        for arm, flags in arms.items()
    ]
    found += [
        Cell("start", arm, size, seed, flags=arms[arm])
        for size in ("base", "tiny")
        for seed in range(2)
        for arm in ("inherit+KD", "inherit+task")
    ]
    found += [
        Cell("data", "inherit+KD", "small", seed, pictures)
        for pictures in SMALLER
        for seed in range(2)
    ]
    found += [
        Cell("terms", arm, "small", seed, flags=flags)
        for arm, flags in terms.items()
        for seed in range(2)
    ]
    return found


def write_pictures(work: Path, folder: Path, count: int) -> None:
    """An image folder with the first ``count`` renders of the world."""
    if (folder / "metadata.csv").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    images = np.load(work / "data/train-images.npy", mmap_mode="r")
    texts = json.loads((work / "data/train-captions.json").read_text())
    for number in range(count):
        Image.fromarray(images[number]).save(folder / f"{number:05d}.png")
    scratch = folder / "metadata.tmp"
    with open(scratch, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        rows.writerows([f"{n:05d}.png", texts[n]] for n in range(count))
    scratch.rename(folder / "metadata.csv")


def run(words: list[str]) -> None:
    code = command(words)
    if code:
        raise SystemExit(code)


def prepare(work: Path, out: Path) -> None:
    """Pictures, caches, real pictures, captions, and the teacher's own evaluation."""
    for count in (PICTURES, *SMALLER):
        folder = out / f"pictures-{count}"
        write_pictures(work, folder, count)
        where = ["--data", str(folder), "--out", str(out / f"cache-{count}"), "--embeds"]
        if not (out / f"cache-{count}/manifest.json").exists():
            run(["cache", "--teacher", "pocket-teacher", *where])
    real = out / "real"
    real.mkdir(exist_ok=True)
    heldout = np.load(work / "data/heldout-images.npy")[:REAL]
    for number, image in enumerate(heldout):
        if not (real / f"{number:05d}.png").exists():
            Image.fromarray(image).save(real / f"{number:05d}.png")
    (out / "captions.txt").write_text("\n".join(captions(CAPTIONS)[0]) + "\n")
    evaluate(out, "pocket-teacher", out / "teacher", [])


def evaluate(out: Path, backbone: str, folder: Path, more: list[str]) -> dict[str, Any]:
    given = ["--captions", str(out / "captions.txt"), "--real", str(out / "real")]
    rest = ["--extractors", "pocket", "--guidance", "4", "--batch-size", "25"]
    run(["evaluate", backbone, *given, "--out", str(folder), *rest, *more])
    return read_results(folder)


def measure(cell: Cell, out: Path, judge: Any) -> dict[str, Any]:
    student, scores = out / "students" / cell.name, out / "scores" / cell.name
    models = ["--size", cell.size, "--teacher", "pocket-teacher", "--out", str(student)]
    given = ["--data", str(out / f"cache-{cell.pictures}"), "--seed", str(cell.seed)]
    recipe = ["--steps", str(STEPS), "--batch-size", str(BATCH), "--accumulation", "1"]
    rest = ["--learning-rate", str(RATE), "--ema", str(EMA), "--caption-dropout", "0.1"]
    run(["distill", *models, *given, *recipe, *rest, "--tracker", "none", *cell.flags])
    result = evaluate(out, str(student), scores, ["--teacher", str(out / "teacher")])
    right = attributes(judge, scores / "pictures")
    shutil.rmtree(student)
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    intervals = {name: metric["ci95"] for name, metric in result["metrics"].items()}
    return {
        "group": cell.group, "arm": cell.arm, "size": cell.size, "seed": cell.seed,
        "pictures": cell.pictures, "attributes": float(right.mean()),
        "attributes_ci95": bootstrap_mean(right), "attributes_by_caption": right.tolist(),
        "paired_by_caption": read_rows(scores)["paired_distance"],
        "metrics": values, "ci95": intervals,
    }  # fmt: skip


def attributes(judge: Any, folder: Path) -> np.ndarray:
    """Share of kind, colour and scene right, a picture."""
    paths = sorted(folder.glob("*.png"))
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    return np.asarray((probe.classify(judge, images) == captions(CAPTIONS)[1]).mean(1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("work/ablation"))
    parser.add_argument("--work", type=Path, default=Path("work/pocket"))
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    options = parser.parse_args()
    chosen = [cell for cell in cells() if options.only in cell.name]
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return
    data.run(options.work)
    options.out.mkdir(parents=True, exist_ok=True)
    prepare(options.work, options.out)
    judge = probe.load()
    DOCS.mkdir(parents=True, exist_ok=True)
    for cell in chosen:
        if not cell.path.exists():
            write_text_atomic(
                cell.path, json.dumps(measure(cell, options.out, judge), indent=1) + "\n"
            )


if __name__ == "__main__":
    main()

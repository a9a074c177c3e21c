"""Table and plot of the cells that ``scripts/ablation.py`` left in ``docs/ablation``.

    python scripts/ablation_report.py     (writes docs/ablation.md and docs/images/ablation.png)

Intervals of differences: bootstrap over captions and over seeds of the training; both arms of a
pair drew the same captions from the same noise, and trained on the same order and noise.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bksdm_tune.evaluate.statistics import bootstrap_crossed
from scripts.ablation import CAPTIONS, DOCS, PICTURES, STEPS, cells

PAGE, PLOT = DOCS.parent / "ablation.md", DOCS.parent / "images/ablation.png"
VOLUME = PLOT.with_name("ablation-data.png")
COLUMNS = ("attributes", "paired_distance", "frechet", "clip_score")
Key = tuple[str, str, str, int]  # group, size, arm, pictures


def load() -> dict[Key, list[dict[str, Any]]]:
    """Cells that are there, seeds of one arm together, in the order of the plan."""
    found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells():
        if cell.path.exists():
            key = (cell.group, cell.size, cell.arm, cell.pictures)
            found[key].append(json.loads(cell.path.read_text()))
    return found


def value(result: dict[str, Any], column: str) -> float:
    return float(result[column] if column == "attributes" else result["metrics"][column])


def rows(found: dict[Key, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| cell | student | arm | pictures | seeds | attributes right | paired distance | Frechet "
        "| CLIP score |",
        "|---" * 9 + "|",
    ]
    for (group, size, arm, pictures), results in found.items():
        cells_ = [spread([value(r, column) for r in results]) for column in COLUMNS]
        lines.append(
            f"| {group} | {size} | {arm} | {pictures:,} | {len(results)} | {' | '.join(cells_)} |"
        )
    return lines


def spread(values: list[float]) -> str:
    """Mean, and smallest to largest over seeds."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def difference(a: list[dict[str, Any]], b: list[dict[str, Any]], column: str) -> str:
    """a minus b of a figure known by caption: mean, interval, and how many seeds."""
    theirs = {result["seed"]: result for result in b}
    pairs = [(r, theirs[r["seed"]]) for r in a if r["seed"] in theirs]
    gaps = np.array([np.subtract(mine[column], other[column]) for mine, other in pairs])
    low, high = bootstrap_crossed(gaps)
    return f"{gaps.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def shift(a: list[dict[str, Any]], b: list[dict[str, Any]], column: str) -> str:
    """a minus b of a figure known for all captions together: mean, and the range over seeds."""
    theirs = {result["seed"]: value(result, column) for result in b}
    gaps = [value(r, column) - theirs[r["seed"]] for r in a if r["seed"] in theirs]
    return f"{np.mean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})"


def differences(found: dict[Key, list[dict[str, Any]]]) -> list[str]:
    full = ("start", "small", "inherit+KD", PICTURES)
    wanted = [
        (("start", size, "inherit+KD", PICTURES), ("start", size, "inherit+task", PICTURES))
        for size in ("base", "small", "tiny")
    ]
    wanted.append(
        (("start", "small", "random+KD", PICTURES), ("start", "small", "random+task", PICTURES))
    )
    wanted += [(full, key) for key in found if key[0] in ("data", "terms")]
    lines = [
        "| first minus second | attributes right | paired distance | Frechet (range over seeds) |",
        "|---" * 4 + "|",
    ]
    for a, b in wanted:
        if a in found and b in found:
            columns = ("attributes_by_caption", "paired_by_caption")
            cells_ = [difference(found[a], found[b], column) for column in columns]
            cells_.append(shift(found[a], found[b], "frechet"))
            lines.append(f"| {a[1]} {a[2]} over {b[2]}, {b[3]:,} pictures | {' | '.join(cells_)} |")
    return lines


def plot(found: dict[Key, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{size} {arm}\n{pictures:,}" for _, size, arm, pictures in found]
    size = (0.75 * len(labels) + 2, 6.4)
    figure, panels = pyplot.subplots(2, sharex=True, figsize=size)
    for axes, column in zip(panels, ("attributes", "paired_distance"), strict=True):
        for x, results in enumerate(found.values()):
            axes.plot([x] * len(results), [value(r, column) for r in results], "o", alpha=0.7)
        axes.set_ylabel(column.replace("_", " "))
        axes.grid(axis="y", alpha=0.3)
    panels[1].set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    panels[0].set_title(
        f"Students of pocket-teacher after {STEPS} steps, {CAPTIONS} captions; a dot is a seed"
    )
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def plot_volume(found: dict[Key, list[dict[str, Any]]]) -> None:
    """The student of all three data sizes, as the reference's data-volume figure."""
    from matplotlib import pyplot

    sizes = {
        key[3]: results for key, results in found.items() if key[1:3] == ("small", "inherit+KD")
    }
    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3))
    for axes, column in zip(panels, ("attributes", "paired_distance", "frechet"), strict=True):
        counts = sorted(sizes)
        values = [[value(result, column) for result in sizes[count]] for count in counts]
        for count, seeds in zip(counts, values, strict=True):
            axes.plot([count] * len(seeds), seeds, "o", color="C0", alpha=0.7)
        axes.plot(counts, [np.mean(seeds) for seeds in values], color="C0")
        axes.set_xscale("log")
        axes.set_xlabel("pictures")
        axes.set_title(column.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(VOLUME, dpi=110)


PAGE_TEXT = """\
# What distillation is worth, on pocket

{count} of {planned} cells, made by `python scripts/ablation.py` and put together by
`python scripts/ablation_report.py`. Each is one student of `pocket-teacher` trained for {steps}
steps of 32 pictures of the illustrated world, then {captions} captions drawn at the teacher's
noise. It says nothing about the full-size models. "inherit" starts from the teacher's weights in
the kept blocks, "random" from random ones; "KD" is the whole objective, "task" the diffusion loss
alone. Attributes (kind, colour, background) are judged by the probe classifier; the paired distance
is 1 - cosine to the teacher's picture of the same caption and noise, on the pocket looks encoder,
as the Frechet distance to 2,000 held-out renders is; brackets are the range over seeds.

![Attributes right and paired distance by arm](images/ablation.png)

{table}

The small student by the number of pictures it saw (a dot is a seed):

![By number of pictures](images/ablation-data.png)

## Differences

{differences}

{findings}
"""
FINDINGS = DOCS / "findings.md"


def main() -> None:
    found = load()
    if not found:
        raise SystemExit(f"There are no cells in {DOCS}; run scripts/ablation.py first.")
    plot(found)
    plot_volume(found)
    text = PAGE_TEXT.format(
        count=sum(map(len, found.values())),
        planned=len(cells()),
        steps=STEPS,
        captions=CAPTIONS,
        table="\n".join(rows(found)),
        differences="\n".join(differences(found)),
        findings=FINDINGS.read_text("utf-8").strip(),
    )
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

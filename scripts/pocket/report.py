"""Stage ``report``: attributes right over 500 generated captions, a row a model; then the cards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bksdm_tune.pipeline import Shot, draw, load_for_drawing
from bksdm_tune.resolve import resolve
from scripts.pocket import pack, probe
from subjects.illustrated.looks import COLOURS, KINDS
from subjects.illustrated.scenes import SCENES

CAPTIONS, STEPS, GUIDANCE = 500, 25, 4.0


def captions(count: int) -> tuple[list[str], np.ndarray]:
    """``a <colour> <kind> <scene>`` drawn at random, and what the probe should see."""
    rng = np.random.default_rng(77)
    wanted = np.stack([rng.integers(len(n), size=count) for n in (KINDS, COLOURS, SCENES)], 1)
    kinds, colours, scenes = list(KINDS), list(COLOURS), list(SCENES)
    return [f"a {colours[c]} {kinds[k]} {scenes[s]}" for k, c, s in wanted], wanted


def run(work: Path) -> None:
    texts, wanted = captions(CAPTIONS)
    shots = [Shot(text, 10_000 + i, STEPS, GUIDANCE) for i, text in enumerate(texts)]
    judge, rows = probe.load(), {}
    for size in pack.SIZES:
        pipe = load_for_drawing(resolve(f"pocket-{size}"), "cpu")
        images = np.stack([np.asarray(i) for i in draw(pipe, shots, 25, title=size)])
        right = (probe.classify(judge, images) == wanted).mean(0)
        rows[size] = dict(zip(probe.HEADS, right.tolist(), strict=True)) | {
            "all attributes": float(right.mean())
        }
        print(size, json.dumps(rows[size]))
    (work / "family").mkdir(exist_ok=True)
    (work / "family/report.json").write_text(json.dumps(rows, indent=2) + "\n")
    pack.write_cards(work)

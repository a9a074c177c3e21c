"""Personalise a pocket backbone on each of the 30 illustrated subjects and judge the pictures.

    python scripts/evaluate_pocket.py --out work/evaluation [--backbone NAME] [--subjects dog]

Per subject, on the 20 DreamBooth scenes (none is among the twin's photos, which are taken at home):
nearest-look identification against 10 other looks of its class, background by the probe, before and
after tuning at the same seeds; and variety of the plain class prompt, with and without prior
preservation.  Resumable: a subject's result is a file.  Intervals: bootstrap over subjects.
``overview.png`` shows every subject under the last prior: a photo, a scene before tuning, the same
seed after it, another scene.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from bksdm_tune.artifacts import write_text_atomic
from bksdm_tune.cli import main as command
from bksdm_tune.evaluate.encoders import Encoder, pocket_looks
from bksdm_tune.evaluate.statistics import bootstrap_mean
from bksdm_tune.pipeline import Shot, draw, load_for_drawing
from bksdm_tune.resolve import resolve
from scripts.pocket import probe
from subjects.catalogue import SUBJECTS
from subjects.illustrated.looks import KINDS, random_look
from subjects.illustrated.render import Picture, render
from subjects.illustrated.scenes import DREAMBOOTH_SCENES, HOME_SCENES, SCENES
from subjects.illustrated.twins import FORBIDDEN, TWINS, twin_photos

RIVALS, PHOTOS_A_RIVAL, CLASS_PICTURES, TRIGGER = 10, 5, 24, "sks11df"
OVERVIEW_SCENES = (1, 2)  # snow, beach
PRIORS = ("none", "prediction", "images")


def embed(looks: Encoder, pictures: list[Image.Image]) -> np.ndarray:
    images = torch.from_numpy(np.stack([looks.prepare(picture) for picture in pictures]))
    with torch.inference_mode():
        return looks.images(images).double().numpy()


def centre(features: np.ndarray) -> np.ndarray:
    mean = features.mean(0)
    return mean / np.linalg.norm(mean)


def gallery(model: Any, name: str) -> np.ndarray:
    """(11, width): the subject's look first, then RIVALS other looks of its class, at home."""
    rng = np.random.default_rng(zlib.crc32(f"rivals of {name}".encode()))
    rows = [centre(embed(model, twin_photos(name)))]
    for _ in range(RIVALS):
        look = random_look(rng, TWINS[name].kind, FORBIDDEN)
        scenes = rng.choice(HOME_SCENES, PHOTOS_A_RIVAL)
        rows.append(centre(embed(model, [render(Picture(look, str(s)), rng) for s in scenes])))
    return np.stack(rows)


def scene_shots(name: str, guidance: float) -> list[Shot]:
    noun = SUBJECTS[name].class_noun
    return [
        Shot(f"a {TRIGGER} {noun} {scene}", 50 + i, guidance_scale=guidance)
        for i, scene in enumerate(DREAMBOOTH_SCENES)
    ]


def judge(pictures: list[Image.Image], model: Any, classifier: Any, rows: np.ndarray) -> Any:
    """Shares of pictures with the right look and scene; mean cosine to the subject's photos."""
    features = embed(model, pictures)
    cosine = features @ rows.T
    seen = probe.classify(classifier, np.stack([np.asarray(p.resize((64, 64))) for p in pictures]))
    wanted = np.array([list(SCENES).index(scene) for scene in DREAMBOOTH_SCENES])
    return {
        "identified": float((cosine.argmax(1) == 0).mean()),
        "scene": float((seen[:, 2] == wanted).mean()),
        "similarity": float(cosine[:, 0].mean()),
        "kinds": np.bincount(seen[:, 0], minlength=len(KINDS)).tolist(),
    }


def variety(pictures: list[Image.Image], model: Any, rows: np.ndarray) -> dict[str, float]:
    """Of plain class pictures: mean pairwise cosine distance, and cosine to the subject (leak)."""
    features = embed(model, pictures)
    pairs = (features @ features.T)[np.triu_indices(len(features), 1)]
    return {"variety": float(1 - pairs.mean()), "leak": float((features @ rows[0]).mean())}


@functools.cache
def untuned(
    backbone: str, scenes: tuple[Shot, ...], plain: tuple[Shot, ...]
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures before tuning; subjects of one class share them."""
    pipe = load_for_drawing(resolve(backbone), "cpu")
    return draw(pipe, scenes, 20), draw(pipe, plain, 24)


def evaluate(name: str, options: Any, model: Any, classifier: Any) -> dict[str, Any]:
    rows, noun = gallery(model, name), SUBJECTS[name].class_noun
    scenes = scene_shots(name, options.guidance)
    plain = [
        Shot(f"a {noun}", 900 + i, guidance_scale=options.guidance) for i in range(CLASS_PICTURES)
    ]
    result: dict[str, Any] = {"subject": name, "class_noun": noun}
    before = untuned(options.backbone, tuple(scenes), tuple(plain))
    result["before"] = judge(before[0], model, classifier, rows) | variety(before[1], model, rows)
    for prior in options.priors:
        out = options.out / f"{name}-{prior}"
        flags = ["--subject", name, "--backbone", options.backbone, "--prior", prior]
        method = [] if options.full else ["--lora"]
        started = time.perf_counter()
        code = command(["dreambooth", *flags, *method, "--preview-prompts", "--out", str(out)])
        assert code == 0, (name, prior, code)
        seconds = time.perf_counter() - started
        after = load_for_drawing(resolve(str(out)), "cpu")
        pictures = draw(after, scenes, 20)
        for picture, shot in zip(pictures, scenes, strict=True):
            picture.save(out / f"scene-{shot.seed}.png")
        result[prior] = judge(pictures, model, classifier, rows)
        result[prior] |= variety(draw(after, plain, 24), model, rows) | {"seconds": seconds}
    return result


def table(results: list[dict[str, Any]], arms: list[str]) -> str:
    columns = ("identified", "scene", "similarity", "variety", "leak", "seconds")
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm in arms:
        cells = []
        for column in columns:
            values = np.array([row[arm].get(column, np.nan) for row in results])
            if np.isnan(values).any():
                cells.append("")
                continue
            low, high = bootstrap_mean(values)
            cells.append(f"{values.mean():.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def overview(options: Any) -> Image.Image:
    """Three columns of subjects, each with a photo, a scene before, the same after, another."""
    columns, cell, label, gap = 3, 72, 14, 8
    rows = -(-len(options.subjects) // columns)
    sheet = Image.new("RGB", (columns * (4 * cell + gap), rows * (cell + label)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, name in enumerate(options.subjects):
        shots = [scene_shots(name, options.guidance)[i] for i in OVERVIEW_SCENES]
        folder = options.out / f"{name}-{options.priors[-1]}"
        after = [Image.open(folder / f"scene-{shot.seed}.png") for shot in shots]
        before = draw(load_for_drawing(resolve(options.backbone), "cpu"), shots[:1])
        x, y = number % columns * (4 * cell + gap), number // columns * (cell + label)
        pen.text((x, y), name.replace("_", " "), "black", font)
        for place, picture in enumerate([twin_photos(name)[0], *before, *after]):
            sheet.paste(picture.resize((cell - 2, cell - 2)), (x + place * cell, y + label))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", default="pocket-base")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS))
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=["none", "prediction"])
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--full", action="store_true", help="full tuning instead of LoRA")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model, classifier = pocket_looks("cpu"), probe.load()
    results = []
    for name in options.subjects:
        path = options.out / f"{name}.json"
        if not path.exists():
            result = evaluate(name, options, model, classifier)
            write_text_atomic(path, json.dumps(result, indent=2))
        results.append(json.loads(path.read_text()))
        print(table(results, ["before", *options.priors]), flush=True)
    (options.out / "table.md").write_text(table(results, ["before", *options.priors]))
    overview(options).save(options.out / "overview.png")


if __name__ == "__main__":
    main()

"""``bksdm-tune score``: how well a subject was learned, by a stated protocol, how surely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import MANIFEST, read_manifest, write_text_atomic
from bksdm_tune.config import parse
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.evaluate.score_config import Config

PARTIAL = 4


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune score")
    if config.init is not None:
        from bksdm_tune.evaluate.init_manifest import init

        path = init(config.init, config.photos, config.class_noun, config.identifier)
        print(f"Wrote {path}. Then: bksdm-tune score --manifest {path}")
        return 0
    out = config.out or default_out(config)
    try:
        result = run(config, out)
    except DataError as error:
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomic(out / "errors.txt", f"{error}\n")
        raise
    print(table(result))
    print(f"Look at {out / 'report.html'}")
    return 0 if result["complete"] else PARTIAL


def default_out(config: Config) -> Path:
    if config.manifest is not None:
        return config.manifest.parent / "scores"
    assert config.model is not None
    here = Path(config.model)
    return here / "score" if here.is_dir() else Path("scores") / here.stem


def run(config: Config, out: Path) -> dict[str, Any]:
    from bksdm_tune.evaluate.protocols import load_judges
    from bksdm_tune.evaluate.score import score
    from bksdm_tune.pipeline import best_device

    device = best_device()
    partial = config.on_missing == "partial"
    if config.manifest is not None:
        check_readable(config.manifest)
        judges = load_judges(config.protocol, config.dino, config.clip, device)
        name = config.manifest.resolve().parent.name
        return score(
            config.manifest, judges, out, name, config.batch_size, partial, config.floor, device
        )
    parts, sitter, side = subject_of(config)
    judges = load_judges(config.protocol, config.dino, config.clip, device)  # before drawing
    from bksdm_tune.evaluate.drawing import Grid, draw_floor, draw_for_score

    grid = Grid(config.prompts, config.images, config.class_images)
    manifest = draw_for_score(parts, sitter, grid, out, side, device)
    floor = config.floor
    if floor is None:
        under = backbone_of(config, parts)
        plain = draw_floor(under, sitter, grid, out / "untuned", side, device)
        floor = out / "untuned"
        score(plain, judges, floor, f"{under.name}, untuned", config.batch_size, device=device)
    return score(
        manifest, judges, out, config.model or "", config.batch_size, partial, floor, device
    )


def check_readable(path: Path) -> None:
    if not path.is_file():
        raise DataError(
            f"--manifest {path} is not there. `bksdm-tune score --init FOLDER` makes one."
        )


def subject_of(config: Config) -> tuple[Any, Any, int | None]:
    """Parts of the model, whose pictures to draw, and the pictures' side.

    Raises:
        UsageError: an adapter file does not say what it learned.
        DataError: the photos are gone.
    """
    from bksdm_tune.evaluate.drawing import Sitter
    from bksdm_tune.generate import Config as Drawing
    from bksdm_tune.generate import find_model
    from subjects.photos import read_photos

    assert config.model is not None
    model = find_model(Drawing(config.model, "", backbone=config.backbone, base=config.base))
    path = Path(config.model)
    run = path if path.is_dir() else path.parent
    manifest = read_manifest(run) if (run / MANIFEST).is_file() else {"config": {}, "parents": {}}
    said, parents = manifest["config"], manifest["parents"]
    words = (model.trigger or "").split(maxsplit=1)
    identifier = config.identifier or said.get("prompts", {}).get("identifier") or _at(words, 0)
    noun = config.class_noun or _at(words, 1)
    folder = config.photos or (Path(parents["photo_folder"]) if "photo_folder" in parents else None)
    lacking = [
        flag
        for flag, value in (
            ("--identifier", identifier),
            ("--class-noun", noun),
            ("--photos", folder),
        )
        if not value
    ]
    if lacking:
        raise UsageError(f"{config.model} does not say what it learned: add {', '.join(lacking)}.")
    assert identifier and noun and folder
    if not folder.is_dir():
        raise DataError(f"The photos are no longer in {folder}; name their folder with --photos.")
    who = said.get("who", {})
    name = who.get("subject") or who.get("name") or folder.resolve().name
    photos = read_photos(folder, minimum_side=1)
    return model.parts, Sitter(slug(name), noun, identifier, photos), model.side


def _at(words: list[str], place: int) -> str | None:
    return words[place] if len(words) > place else None


def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def backbone_of(config: Config, parts: Any) -> Any:
    """What was tuned: of a LoRA the parts without it, of a full run what its manifest names."""
    from bksdm_tune.resolve import resolve

    if parts.adapter is not None:
        return replace(parts, adapter=None)
    trained_on = read_manifest(Path(config.model or ""))["parents"]["backbone"]
    return resolve(trained_on["ref"], trained_on.get("base"))


def table(result: dict[str, Any]) -> str:
    """Markdown: a line a metric."""
    counts = result["counts"]
    lines = [
        f"Protocol {result['protocol']['name']}: {counts['subjects']} subjects, "
        f"{counts['references']} photos, {counts['generated']} pictures, {counts['cells']} cells.",
        "| | mean | 95 % interval | untuned | photos | normalised |",
        "|---|---|---|---|---|---|",
    ]
    for name, metric in result["metrics"].items():
        if metric["macro"] is None:
            lines.append(f"| {name} | | {metric['reason']} | | | |")
            continue
        low, high = metric["ci95"] or (None, None)
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        top = metric["ceiling"]["without_self"] if metric["ceiling"] else None
        rest = [_figure(v) for v in (metric["floor"], top, metric["normalised"])]
        lines.append(f"| {name} | {metric['macro']:.3f} | {interval} | {' | '.join(rest)} |")
    if result["exclusions"]:
        lines.append(f"Not complete: {len(result['exclusions'])} left out, see scores.json.")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

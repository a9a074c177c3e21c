"""``bksdm-tune score``: how well a subject was learned, by a stated protocol, how surely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import write_text_atomic
from bksdm_tune.config import parse
from bksdm_tune.errors import DataError
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
    (out / "errors.txt").unlink(missing_ok=True)  # of an earlier call
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
    from bksdm_tune.device import best_device
    from bksdm_tune.evaluate.protocols import load_judges
    from bksdm_tune.evaluate.score import score
    from bksdm_tune.evaluate.score_model import score_model, subject_of

    device = best_device()
    if config.manifest is not None:
        check_readable(config.manifest)
    else:
        subject_of(config)  # said before weights are downloaded
    judges = load_judges(config.protocol, config.dino, config.clip, device)
    if config.manifest is None:
        return score_model(config, out, judges, device)
    name, partial = config.manifest.resolve().parent.name, config.on_missing == "partial"
    return score(
        config.manifest, judges, out, name, config.batch_size, partial, config.floor, device
    )


def check_readable(path: Path) -> None:
    if not path.is_file():
        raise DataError(
            f"--manifest {path} is not there. `bksdm-tune score --init FOLDER` makes one."
        )


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

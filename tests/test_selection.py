"""Scores on the way: what is noted, which step is delivered, when it is enough, photos held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from bksdm_tune.artifacts import read_manifest
from bksdm_tune.cli import main
from bksdm_tune.dreambooth.selection import best, front
from bksdm_tune.evaluate import watch
from bksdm_tune.evaluate.watch import Point, Watch
from tiny import make_pipeline

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("backbone") / "base", size="base")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts, one picture each, two denoising steps."""
    monkeypatch.setattr(watch, "EVERY_THIRD", 9)
    monkeypatch.setattr(watch, "GRID", watch.Grid(images=1, class_images=0, seed=7, steps=2))


def run(backbone: Path, out: Path, *flags: str, steps: int = 6) -> int:
    fixed = ["--subject", "dog", "--lora", "--backbone", str(backbone), "--out", str(out)]
    return main(["dreambooth", *fixed, "--preview-prompts", "--steps", str(steps), *flags])


def points(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def scripted(monkeypatch: pytest.MonkeyPatch, values: dict[int, tuple[float, float]]) -> None:
    """Step -> DINO and CLIP-T, whatever was drawn; intervals are +- 0.1."""

    def score(self: Watch, step: int, pictures: Any) -> Point:
        dino, clip = values[step]
        return Point(step, dino, clip, (dino - 0.1, dino + 0.1), (clip - 0.1, clip + 0.1))

    monkeypatch.setattr(Watch, "score", score)


def test_scoring_changes_nothing(backbone: Path, tmp_path: Path) -> None:
    assert run(backbone, tmp_path / "plain") == 0
    assert run(backbone, tmp_path / "scored", "--score-every", "2") == 0
    assert (tmp_path / "plain" / LORA).read_bytes()[-4000:] == (
        tmp_path / "scored" / LORA
    ).read_bytes()[-4000:]
    found = points(tmp_path / "scored")
    assert [point["step"] for point in found] == [2, 4, 6]
    for point in found:
        assert -1 <= point["dino"] <= 1 and point["dino_ci95"][0] <= point["dino"]
    assert "scores.png" in (tmp_path / "scored/README.md").read_text()
    assert (tmp_path / "scored/scores.png").stat().st_size > 5000
    assert read_manifest(tmp_path / "scored")["results"]["selection"]["delivered"] == 6


def test_the_best_step_is_delivered(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 is more like the photos than the last step, by whose interval it has not fewer words; 2 has
    more of both at first, and none of its weights is needed when 4 is there."""
    scripted(monkeypatch, {2: (0.4, 0.7), 4: (0.5, 0.75), 6: (0.45, 0.8)})
    flags = ["--score-every", "2", "--checkpoint-every", "2", "--keep", "9"]
    assert run(backbone, tmp_path / "run", *flags, "--keep-best") == 0
    manifest = read_manifest(tmp_path / "run")
    assert manifest["results"]["selection"] == {
        "scored": [2, 4, 6], "best": 4, "delivered": 4, "taken": 6,
    }  # fmt: skip
    delivered = load_file(tmp_path / "run" / LORA)
    for step, same in ((4, True), (6, False)):
        other = load_file(tmp_path / f"run/checkpoint-{step}" / LORA)
        assert all((delivered[key] == other[key]).all() for key in delivered) == same
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-scored*")] == [
        "checkpoint-scored-4"
    ]
    assert "Step 4 of 6 taken is what is here" in (tmp_path / "run/README.md").read_text()


def test_it_stops_where_nothing_gets_better(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {2: (0.5, 0.8), 4: (0.4, 0.8), 6: (0.3, 0.8), 8: (0.9, 0.8)})
    flags = ["--score-every", "2", "--patience", "2", "--keep-best"]
    assert run(backbone, tmp_path / "run", *flags, steps=20) == 0
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 6
    assert read_manifest(tmp_path / "run")["results"]["selection"]["delivered"] == 2
    assert run(backbone, tmp_path / "run", *flags, steps=20) == 0  # finished; nothing to do
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 6


def test_the_newest_point_says_how_many_words_may_be_lost() -> None:
    def point(step: int, dino: float, clip: float) -> Point:
        return Point(step, dino, clip, (0, 1), (clip - 0.05, clip + 0.05))

    learning = [point(1, 0.3, 0.8), point(2, 0.7, 0.6)]  # the subject is only now learned
    assert best(learning) is learning[1]
    path = [*learning, point(3, 0.6, 0.66)]  # 2 lost more words than 3's interval allows
    assert best(path) is path[2]
    path.append(point(4, 0.5, 0.64))  # but not more than 4's
    assert best(path) is path[1]
    assert best([]) is None


def test_what_may_be_the_best_later_is_kept() -> None:
    """Whatever comes next, the best is never among those whose weights were let go."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        path: list[Point] = []
        forgotten: set[int] = set()
        for step in range(8):
            dino, clip = rng.integers(0, 6, 2) / 10  # ties as well
            path.append(Point(step, dino, clip, (0, 1), (clip - 0.15, clip + 0.15)))
            forgotten |= {p.step for p in path} - {p.step for p in front(path)}
            chosen = best(path)
            assert chosen is not None and chosen.step not in forgotten
        assert forgotten


def test_photos_are_held_out(backbone: Path, tmp_path: Path, capsys: Any) -> None:
    """Trained without the last photo, scored against it alone."""
    assert run(backbone, tmp_path / "run", "--holdout", "1", steps=2) == 0
    parents = read_manifest(tmp_path / "run")["parents"]
    assert len(parents["photos"]) == 4 and len(parents["held_out"]) == 1
    assert not parents["photos"].keys() & parents["held_out"].keys()
    few = ["--protocol", "pocket", "--prompts", "1", "--images", "1", "--class-images", "0"]
    assert main(["score", str(tmp_path / "run"), *few]) == 0
    lines = (tmp_path / "run/score/manifest.jsonl").read_text().splitlines()
    photos = [row["path"] for row in map(json.loads, lines) if row["role"] == "reference"]
    assert [Path(path).name for path in photos] == list(parents["held_out"])
    moved = tmp_path / "moved"  # wherever they lie, what was learned from is no reference
    shutil.copytree(parents["photo_folder"], moved, ignore=shutil.ignore_patterns("*.json"))
    there = ["--photos", str(moved), "--out", str(tmp_path / "score")]
    assert main(["score", str(tmp_path / "run"), *few, *there]) == 0
    lines = (tmp_path / "score/manifest.jsonl").read_text().splitlines()
    assert sum('"reference"' in line for line in lines) == 1
    (moved / next(iter(parents["held_out"]))).unlink()
    there[-1] = str(tmp_path / "score2")
    assert main(["score", str(tmp_path / "run"), *few, *there]) == 3
    assert "was trained on every photo" in capsys.readouterr().err
    assert run(backbone, tmp_path / "none", "--holdout", "5") == 2
    assert "leaves no photo to learn from" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--keep-best"], ["--patience", "2"]])
def test_selection_needs_scores(
    backbone: Path, tmp_path: Path, flag: list[str], capsys: Any
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(backbone, tmp_path / "run", *flag)
    assert ended.value.code == 2 and "--score-every" in capsys.readouterr().err

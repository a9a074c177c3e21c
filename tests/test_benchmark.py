"""What ``scripts/benchmark.py`` would run: the same settings on both sides, any shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from scripts import full_size
from scripts.benchmark import parser
from scripts.benchmarks import common
from scripts.benchmarks.reference import MENDED


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "dog.png")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The lines of the reference's script that are mended, nothing else."""
    source = tmp_path / "checkout/src"
    source.mkdir(parents=True)
    for name, changes in MENDED.items():
        (source / name).write_text("".join(old for old, _ in changes))
    return source.parent


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    options = parser().parse_args([*words, "--dry-run", "--out", "unused.json"])
    options.measure(options)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


SAME = {
    "--steps": "--max_train_steps",
    "--batch-size": "--train_batch_size",
    "--learning-rate": "--learning_rate",
    "--lr-scheduler": "--lr_scheduler",
    "--prior-weight": "--prior_loss_weight",
    "--resolution": "--resolution",
    "--precision": "--mixed_precision",
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("end_to_end", [False, True])
def test_dreambooth_sides_agree(
    photos: Path, capsys: pytest.CaptureFixture[str], method: str, end_to_end: bool
) -> None:
    words = ["--diffusers", "checkout", "--photos", str(photos), "--method", method]
    found = dry_run(capsys, "dreambooth", *words, *(["--end-to-end"] if end_to_end else []))
    ours, theirs = found["ours"], found["diffusers"]
    assert {a: value(ours, a) for a in SAME} == {a: value(theirs, b) for a, b in SAME.items()}
    assert value(ours, "--prior") == ("prediction" if end_to_end else "images")
    assert ("--class-images" in ours) != end_to_end
    assert "--with_prior_preservation" in theirs and value(theirs, "--num_class_images") == "200"
    if method == "lora":
        assert value(ours, "--rank") == value(ours, "--alpha") == value(theirs, "--rank")


def test_a_full_size_is_made(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, **shape: Any) -> None:
        assert shape == full_size.SHAPES["bk-base"]
        tiny.make_pipeline(folder)

    monkeypatch.setattr(common, "write_pipeline", write)
    words = ["--diffusers", "checkout", "--photos", str(photos), "--full-size", "bk-base"]
    ours = dry_run(capsys, "dreambooth", *words)["ours"]
    assert Path(value(ours, "--backbone")).name == "bk-base"
    assert value(ours, "--resolution") == str(tiny.IMAGE_SIZE)


def test_distillation_sides_agree(
    photos: Path, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--reference", str(checkout), "--data", str(photos), "--batch-size", "64"]
    found = dry_run(capsys, "distill", *words)
    ours, theirs, cache = found["ours"], found["reference"], found["first"]
    assert value(ours, "--batch-size") == value(theirs, "--train_batch_size") == "64"
    assert value(ours, "--steps") == value(theirs, "--max_train_steps")
    assert value(cache, "--resolution") == value(theirs, "--resolution") == "64"


def test_stacks_say_their_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    found = dry_run(capsys, "stack", "--sizes", "1", "30")
    assert (found["sizes"], found["steps"], found["batch_size"]) == ([1, 30], 600, 2)

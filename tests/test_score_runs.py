"""Scores of runs, of adapter files of other tools, and manifests for other tools' pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import scoring
from bksdm_tune.adapters import read_adapter
from bksdm_tune.cli import main
from tiny import make_pipeline

LORA = "pytorch_lora_weights.safetensors"
FEW = ("--prompts", "2", "--images", "2", "--class-images", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A LoRA run with the text encoder on a tiny backbone, and judges."""
    folder = tmp_path_factory.mktemp("run")
    backbone = make_pipeline(folder / "base", size="base")
    words = ["--subject", "dog", "--lora", "--backbone", str(backbone), "--steps", "3"]
    assert main(["dreambooth", *words, "--preview-prompts", "--out", str(folder / "run")]) == 0
    judges = scoring.make_judges(folder)
    return {"folder": folder, "run": folder / "run", "backbone": backbone, "judges": judges}


def command(run: dict[str, Any], model: Path, out: Path, *more: str) -> list[str]:
    encoders = ["--dino", str(run["judges"][0]), "--clip", str(run["judges"][1])]
    return ["score", str(model), "--out", str(out), *encoders, *FEW, *more]


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return found


def test_a_run_is_drawn_and_scored(run: dict[str, Any], tmp_path: Path) -> None:
    assert main(command(run, run["run"], tmp_path)) == 0
    result = read(tmp_path)
    assert result["counts"] == {
        "subjects": 1, "references": 5, "generated": 4, "class_prior": 1, "cells": 2, "black": 0,
        "copied": result["counts"]["copied"],
    }  # fmt: skip
    assert result["metrics"]["dino"]["floor"] is not None
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    drawn = [row for row in rows if row["role"] == "generated"]
    assert {row["seed"] for row in drawn} == {1234, 1235}
    assert {row["prompt_template"] for row in drawn} == {
        "a {0} {1} in the jungle", "a {0} {1} in the snow"
    }  # fmt: skip
    picture = scoring.Image.open(tmp_path / drawn[0]["path"])
    assert picture.text["prompt"] == "a sks11df dog in the jungle"  # type: ignore[attr-defined]


def test_drawing_goes_on_where_it_was_interrupted(run: dict[str, Any], tmp_path: Path) -> None:
    assert main(command(run, run["run"], tmp_path)) == 0
    before = read(tmp_path)
    paths = sorted((tmp_path / "pictures/dog").glob("*.png"))
    times = {path: path.stat().st_mtime_ns for path in paths[1:]}
    data = paths[0].read_bytes()
    paths[0].unlink()
    assert main(command(run, run["run"], tmp_path)) == 0
    assert paths[0].read_bytes() == data and read(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_another_model_does_not_reuse_the_pictures(
    run: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    assert main(command(run, run["run"], tmp_path)) == 0
    assert main(command(run, run["run"], tmp_path, "--identifier", "xyz")) == 2
    assert "pictures of another model or other settings" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_adapters_of_other_tools_score_without_conversion(
    run: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    """The same weights without our metadata, in either tool's keys, draw the same pictures.

    Alpha is the rank here: the diffusers layout without metadata has no place for another.
    """
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    tensors, metadata = read_adapter(run["run"] / LORA)
    tensors = {key: 5 * value.contiguous() for key, value in tensors.items()}  # so that it shows
    save_file(tensors, ours, metadata)
    save_file(kohya(tensors) if layout == "kohya" else tensors, theirs)
    flags = ["--backbone", str(run["backbone"]), "--photos", str(photos_of(run, tmp_path))]
    flags += ["--class-noun", "dog", "--identifier", "sks11df"]
    found = []
    for path in (ours, theirs, run["run"] / LORA):
        out = tmp_path / f"scores of {path.stem}"
        assert main(command(run, path, out, *flags)) == 0
        found.append({n: m["macro"] for n, m in read(out)["metrics"].items() if n != "div"})
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] != pytest.approx(found[0], abs=2e-3)


def kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As kohya's trainer names them: lora_unet_..., lora_te_..., with alpha = rank."""
    found: dict[str, torch.Tensor] = {}
    sides = {"lora_A": "lora_down", "lora.down": "lora_down", "lora_linear_layer.down": "lora_down"}
    sides |= {"lora_B": "lora_up", "lora.up": "lora_up", "lora_linear_layer.up": "lora_up"}
    for key, value in tensors.items():
        side = next(name for name in sides if f".{name}.weight" in key)
        module = key.removesuffix(f".{side}.weight")
        part = "lora_unet" if module.startswith("unet.") else "lora_te"
        name = f"{part}_{module.split('.', 1)[1].replace('.', '_')}"
        found[f"{name}.{sides[side]}.weight"] = value
        if sides[side] == "lora_down":
            found[f"{name}.alpha"] = torch.tensor(len(value))  # an integer, as diffusers writes it
    return found


def photos_of(run: dict[str, Any], folder: Path) -> Path:
    """The run's photos, in a folder of their own."""
    from bksdm_tune.artifacts import read_manifest

    source = Path(read_manifest(run["run"])["parents"]["photo_folder"])
    shutil.copytree(source, folder / "dog")
    (folder / "dog/manifest.json").unlink(missing_ok=True)
    return folder / "dog"


def test_an_adapter_of_another_backbone_leaves_nothing(
    run: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    flags = ["--backbone", "pocket-tiny", "--photos", str(photos_of(run, tmp_path))]
    flags += ["--class-noun", "dog", "--identifier", "sks11df"]
    out = tmp_path / "out"
    assert main(command(run, run["run"] / LORA, out, *flags)) == 3
    assert [path.name for path in out.iterdir()] == ["errors.txt"]
    assert "Traceback" not in capsys.readouterr().err


def test_an_adapter_that_says_nothing(run: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    tensors = load_file(run["run"] / LORA)
    save_file(tensors, tmp_path / "x.safetensors")
    flags = ["--backbone", str(run["backbone"])]
    assert main(command(run, tmp_path / "x.safetensors", tmp_path / "out", *flags)) == 2
    assert "add --identifier, --class-noun, --photos" in capsys.readouterr().err


def test_photos_that_are_gone(run: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    gone = tmp_path / "gone"
    assert main(command(run, run["run"], tmp_path / "out", "--photos", str(gone))) == 3
    assert "name their folder with --photos" in capsys.readouterr().err


def test_init_reads_another_tools_folders(run: dict[str, Any], tmp_path: Path) -> None:
    """By number, by the words, by the words with the identifier and underscores."""
    names = ("0", "a dog in the snow", "a_sks_dog_on_the_beach")
    rng = scoring.np.random.default_rng(0)
    for name in names:
        for i in range(2):
            path = tmp_path / "made/dog" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            scoring.picture(rng).save(path)
    photos = photos_of(run, tmp_path)
    words = ["score", "--init", str(tmp_path / "made"), "--photos", str(photos)]
    assert main([*words, "--identifier", "sks"]) == 0
    manifest = tmp_path / "made/manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    drawn = [row for row in rows if row["role"] == "generated"]
    assert [row["prompt_id"] for row in drawn] == ["00", "00", "01", "01", "02", "02"]
    encoders = ["--dino", str(run["judges"][0]), "--clip", str(run["judges"][1])]
    assert main(["score", "--manifest", str(manifest), *encoders]) == 0
    assert read(tmp_path / "made/scores")["counts"]["cells"] == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("dog", "a dog in space"), "is none of the 25 prompts of a dog"),
        (("rex", "0"), "class-noun"),
    ],
)
def test_init_says_what_it_cannot_place(
    tmp_path: Path, names: tuple[str, str], message: str, run: dict[str, Any], capsys: Any
) -> None:
    path = tmp_path / "made" / names[0] / names[1] / "0.png"
    path.parent.mkdir(parents=True)
    scoring.picture(scoring.np.random.default_rng(0)).save(path)
    photos = photos_of(run, tmp_path)
    assert main(["score", "--init", str(tmp_path / "made"), "--photos", str(photos)]) in (2, 3)
    assert message in capsys.readouterr().err

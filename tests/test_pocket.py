"""The embedded family: what the wheel carries, and that stock diffusers and the main job use it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from bksdm_tune.artifacts import verify_manifest
from bksdm_tune.cli import main
from bksdm_tune.evaluate.encoders import pocket_clip, pocket_looks
from bksdm_tune.pocket import HERE, materialise
from subjects.illustrated.looks import Look
from subjects.illustrated.render import Picture, render
from subjects.illustrated.twins import TWINS, twin_photos

NAMES = ("pocket-teacher", "pocket-base", "pocket-small", "pocket-tiny")
MOST_BYTES = 32_000_000


def test_weights_are_half_precision_and_small() -> None:
    files = sorted(HERE.rglob("*.safetensors"))
    assert len([path for path in files if path.parent.name.startswith("unet-")]) == 4
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    for path in files:
        with safe_open(path, "pt") as file:
            kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert kinds <= {torch.float16, torch.int64}


@pytest.mark.parametrize("name", NAMES)
def test_stock_diffusers_draws_with_it(name: str) -> None:
    folder = materialise(name)
    verify_manifest(folder, "backbones")
    assert (folder / "README.md").read_text().count(name)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert pipe.unet.dtype == torch.float32
    picture = pipe(
        "a red dog on the beach", num_inference_steps=10, generator=torch.manual_seed(0)
    ).images[0]
    assert picture.size == (64, 64)
    assert np.asarray(picture).std() > 20  # neither black nor grey


def test_materialise_is_done_once() -> None:
    first = materialise("pocket-tiny")
    made = (first / "manifest.json").stat().st_mtime_ns
    assert materialise("pocket-tiny") == first
    assert (first / "manifest.json").stat().st_mtime_ns == made


def looks_features() -> tuple[np.ndarray, list[str]]:
    """Unit features of every photo of the illustrated twins, and whose each is."""
    looks = pocket_looks("cpu")
    photos = [(name, photo) for name in TWINS for photo in twin_photos(name, 64)]
    batch = torch.from_numpy(np.stack([looks.prepare(photo) for _, photo in photos]))
    with torch.inference_mode():
        return looks.images(batch).numpy(), [name for name, _ in photos]


def test_the_looks_encoder_tells_twins_of_one_class_apart() -> None:
    """None of their looks was in its training: AUC of same subject against same class."""
    features, names = looks_features()
    same, rivals = [], []
    for i, first in enumerate(names):
        for j, second in enumerate(names[:i]):
            cosine = float(features[i] @ features[j])
            if first == second:
                same.append(cosine)
            elif TWINS[first].kind == TWINS[second].kind:
                rivals.append(cosine)
    assert len(same) > 250 and len(rivals) > 250
    above = np.array(same)[:, None] > np.array(rivals)[None]
    assert above.mean() >= 0.9


def test_the_clip_pair_finds_the_caption() -> None:
    clip = pocket_clip("cpu")
    assert clip.texts is not None
    wanted = [
        ("red", "dog", "on the beach"),
        ("blue", "cat", "in the snow"),
        ("green", "vase", "in the jungle"),
    ]
    captions = [f"a {colour} {kind} {scene}" for colour, kind, scene in wanted]
    looks = [Look(kind, colour, "plain", colour, 1, 1, 1, 0) for colour, kind, _ in wanted]
    pictures = [
        render(Picture(look, scene), np.random.default_rng(2))
        for look, (_, _, scene) in zip(looks, wanted, strict=True)
    ]
    batch = torch.from_numpy(np.stack([clip.prepare(picture) for picture in pictures]))
    with torch.inference_mode():
        scores = clip.images(batch) @ clip.texts(captions).T
    assert scores.argmax(1).tolist() == [0, 1, 2]


def test_the_mission_command_uses_the_twin_and_pocket_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["dreambooth", "--subject", "dog", "--lora", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Backbone: pocket-base")
    assert "illustrated twin" in said
    manifest = verify_manifest(tmp_path / "runs/dog-pocket-base-lora", "dreambooth-lora")
    assert manifest["parents"]["backbone"]["ref"] == "pocket-base"

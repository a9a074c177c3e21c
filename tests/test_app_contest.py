"""Side by side in the app: who is compared, with what scores; the safety checker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bksdm_tune.app.contest import Grader, entries
from bksdm_tune.app.engine import Drawn, Engine, Request
from bksdm_tune.app.library import Library
from bksdm_tune.cli import main
from bksdm_tune.errors import UsageError
from bksdm_tune.evaluate.score_command import Config as Scoring
from bksdm_tune.evaluate.score_command import run as score_run
from tiny import make_pipeline


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """``rex``, a LoRA on pocket-tiny, and ``full``, a full run on a backbone with a checker."""
    folder = tmp_path_factory.mktemp("contest")
    backbone = make_pipeline(folder / "backbone", size="tiny")
    add_checker(backbone)
    library = Library(folder / "library")
    words = ["--subject", "dog", "--steps", "2", "--preview-prompts"]
    for name, more in (
        ("rex", ["--lora", "--backbone", "pocket-tiny"]),
        ("full", ["--backbone", str(backbone)]),
    ):
        assert main(["dreambooth", *words, *more, "--out", str(library.root / name)]) == 0
    return library


def add_checker(root: Path) -> None:
    """A safety checker of random weights, with its feature extractor."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config = CLIPConfig(
        vision_config=small | {"image_size": 32, "patch_size": 16}, text_config=small,
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(config)
    torch.nn.init.normal_(checker.concept_embeds)
    checker.save_pretrained(root / "safety_checker")
    size = {"shortest_edge": 32}
    CLIPImageProcessor(size=size, crop_size=32).save_pretrained(root / "feature_extractor")


def ask(**more: Any) -> Request:
    return Request("a {subject}", "rex", steps=2, n=1, **more)


def labels(library: Library, kind: str, names: list[str], **more: Any) -> list[str]:
    return [entry.label for entry in entries(library, kind, ask(**more), names)]


def test_who_is_compared(library: Library) -> None:
    assert labels(library, "before and after", []) == ["before: pocket-tiny", "after: rex"]
    assert labels(library, "strengths", [])[::4] == ["strength 0", "strength 1"]
    assert labels(library, "models", ["rex", "full"])[0] == "rex (lora, pocket-tiny)"
    family = ["pocket-teacher", "pocket-base", "pocket-small", "pocket-tiny"]
    assert sorted(labels(library, "backbones", [])) == sorted(family)
    found = entries(library, "backbones", ask(), [])
    assert {entry.request.prompt for entry in found} == {"a sks11df dog"}
    for kind, names in (("models", ["rex"]), ("all", []), ("models", ["rex", "nobody"])):
        with pytest.raises(UsageError):
            labels(library, kind, names)
    with pytest.raises(UsageError, match="Only a LoRA"):
        entries(library, "strengths", Request("x", "full"), [])


def test_scores_are_those_of_the_scorer(library: Library, tmp_path: Path) -> None:
    """DINO and CLIP-T of one picture as ``bksdm-tune score`` has them."""
    model = library.get("rex")
    drawn = Engine(library, "cpu").draw(ask(), lambda share: None)
    dino, clip_t = Grader().grade(drawn, model)
    photos = Path(model.manifest["parents"]["photo_folder"])
    names = [path.name for path in shutil.copytree(photos, tmp_path / "p").glob("*.png")]
    lines = [{"role": "reference", "subject_id": "s", "path": f"p/{name}"} for name in names]
    drawn.pictures[0].save(tmp_path / "one.png")
    row = {
        "role": "generated", "subject_id": "s", "path": "one.png", "prompt_id": "p", "seed": 0,
        "sample_idx": 0, "prompt_template": "a {0} {1}", "class_noun": "dog",
        "identifier": "sks11df", "group": "live",
    }  # fmt: skip
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, [*lines, row])))
    result = score_run(Scoring(manifest=manifest, protocol="pocket"), tmp_path / "out")
    assert dino == pytest.approx(result["metrics"]["dino"]["macro"], abs=1e-5)
    assert clip_t == pytest.approx(result["metrics"]["clip_t"]["macro"], abs=1e-5)


def test_withheld_pictures_are_counted(library: Library, tmp_path: Path) -> None:
    engine, request = Engine(library, "cpu"), Request("a {subject}", "full", n=3, steps=2)
    free = checked(engine, request, -2.0)
    assert (len(free.pictures), free.withheld) == (3, 0)
    held = checked(engine, request, 2.0)
    assert (len(held.pictures), held.withheld) == (0, 3)
    assert Grader().grade(held, None) == (None, None)
    assert np.asarray(free.pictures[0]).max() > 0


def checked(engine: Engine, request: Request, closeness: float) -> Drawn:
    """As drawn with a checker that finds everything this much closer to what it withholds."""
    engine.draw(request, lambda share: None)
    (checker,) = engine.checkers.values()
    checker.model.concept_embeds_weights.data.fill_(-closeness)
    checker.model.special_care_embeds_weights.data.fill_(2.0)
    return engine.draw(request, lambda share: None)


def test_what_the_library_says_of_scores(library: Library, monkeypatch: Any) -> None:
    """After scoring through the studio: a line a metric, and the same in the table."""
    from bksdm_tune.app.shelf import row_of, summary
    from bksdm_tune.app.studio import Studio

    studio = Studio(library.root)
    monkeypatch.setattr(
        studio, "_run", lambda words, longest: main([*words, "--prompts", "2", "--images", "1"])
    )
    studio.score("rex")
    model = library.get("rex")
    dino = f"{model.scores['metrics']['dino']['macro']:.3f}"  # type: ignore[index]
    assert f"* DINO: **{dino}" in summary(model) and "Protocol pocket;" in summary(model)
    assert f"<td>{dino}" in row_of(model)

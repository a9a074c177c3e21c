"""Many subjects trained at once: each one's adapter is what it would be alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bksdm_tune.artifacts import verify_manifest
from bksdm_tune.cli import main
from bksdm_tune.dreambooth import learner as learners
from bksdm_tune.dreambooth.config import (
    Config,
    Lora,
    Model,
    Output,
    PriorPreservation,
    Training,
    Who,
)
from bksdm_tune.dreambooth.job import Job, prepare
from bksdm_tune.dreambooth.together import train_together
from bksdm_tune.errors import UsageError
from bksdm_tune.stacked import clip_each
from tiny import make_pipeline

LORA = "pytorch_lora_weights.safetensors"
SUBJECTS = ("dog", "can", "backpack_dog")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("backbone") / "small", size="small")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models, latents and noise in float64."""
    load, moments = learners.load_part, learners.moments_of

    def double(parts: Any, name: str, dtype: Any = None) -> Any:
        part = load(parts, name)
        return part.double() if isinstance(part, torch.nn.Module) else part

    monkeypatch.setattr(learners, "load_part", double)
    monkeypatch.setattr(learners, "moments_of", lambda *words: moments(*words).double())


def job(backbone: Path, subject: str, out: Path, prior: Any = "prediction", **training: Any) -> Job:
    more: dict[str, Any] = {"steps": 20, "learning_rate": 1e-2, "max_grad_norm": 0.05} | training
    config = Config(
        Who(subject), Model(str(backbone), lora=True), training=Training(**more), lora=Lora(rank=2),
        prior=PriorPreservation(prior, class_images=3),
        output=Output(out, preview_prompts=("a {subject} in the snow",), preview_images=1,
                      checkpoint_every=7),
    )  # fmt: skip
    return prepare(config, "cpu")


def apart(one: Path, other: Path) -> float:
    """The largest difference between two adapters."""
    a, b = load_file(one / LORA), load_file(other / LORA)
    assert a.keys() == b.keys() and len(a) > 10
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("prior", ["prediction", "images", "none"])
def test_each_is_what_it_would_be_alone(
    backbone: Path, tmp_path: Path, exact: None, prior: str
) -> None:
    """20 steps in float64, text encoder trained, clipping at work, other numbers of photos."""
    jobs = [job(backbone, name, tmp_path / "stack" / name, prior) for name in SUBJECTS]
    assert {len(one.photos.photos) for one in jobs} > {5}
    train_together(jobs, tmp_path / "loop")
    alone = [job(backbone, name, tmp_path / "alone" / name, prior) for name in SUBJECTS]
    from bksdm_tune.dreambooth.train import train

    for one in alone:
        train(one)
    for name in SUBJECTS:
        assert apart(tmp_path / "stack" / name, tmp_path / "alone" / name) < 1e-9
    assert apart(tmp_path / "stack/dog", tmp_path / "stack/can") > 1e-4


def test_the_run_folders_are_whole(backbone: Path, tmp_path: Path) -> None:
    """Nothing else than the plain command leaves, and the plain command finds them finished."""
    jobs = [job(backbone, name, tmp_path / name, steps=2) for name in SUBJECTS]
    train_together(jobs, tmp_path / "loop")
    for one in jobs:
        manifest = verify_manifest(one.folder, "dreambooth-lora")
        assert manifest["results"]["trained_together"] == 3
        assert {"README.md", "config.toml", "log.jsonl", "contact-sheet.png", LORA} <= set(
            manifest["files"]
        )
        assert len(list((one.folder / "samples").glob("*.png"))) == 2
    words = ["dreambooth", "--config", str(tmp_path / "dog/config.toml")]
    assert main([*words, "--out", str(tmp_path / "dog")]) == 0
    assert len((tmp_path / "dog/log.jsonl").read_text().splitlines()) == 2


def test_an_interrupted_stack_goes_on(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job(backbone, name, tmp_path / "whole" / name) for name in SUBJECTS]
    train_together(jobs, tmp_path / "loop")
    again = [job(backbone, name, tmp_path / "parts" / name) for name in SUBJECTS]
    from bksdm_tune.dreambooth.objective import DreamBooth

    call, calls = DreamBooth.__call__, [0]

    def breaks(self: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 17:
            raise KeyboardInterrupt
        return call(self, batch)

    monkeypatch.setattr(DreamBooth, "__call__", breaks)
    with pytest.raises(KeyboardInterrupt):
        train_together(again, tmp_path / "other")
    train_together(again, tmp_path / "other")
    lines = [json.loads(x) for x in (tmp_path / "other/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21)) and calls[0] == 17 + 20 - 14
    for name in SUBJECTS:
        assert apart(tmp_path / "whole" / name, tmp_path / "parts" / name) == 0


def test_only_alike_jobs_are_stacked(backbone: Path, tmp_path: Path) -> None:
    one, other = job(backbone, "dog", tmp_path / "a"), job(backbone, "cat", tmp_path / "b", steps=3)
    with pytest.raises(UsageError, match="same backbone and settings"):
        train_together([one, other], tmp_path / "loop")
    with pytest.raises(UsageError, match="a run folder each"):
        train_together([one, job(backbone, "cat", tmp_path / "a")], tmp_path / "loop")


def test_what_would_couple_subjects_is_refused(backbone: Path, tmp_path: Path) -> None:
    for changes in ({"optimiser": "adafactor"}, {"precision": "fp16"}):
        two = [job(backbone, name, tmp_path / name, **changes) for name in ("dog", "cat")]
        with pytest.raises(UsageError, match="make each depend on the others"):
            train_together(two, tmp_path / "loop")


def test_gradients_are_clipped_a_subject_at_a_time() -> None:
    torch.manual_seed(0)
    stacked = [torch.nn.Parameter(torch.zeros(3, 4, 5)), torch.nn.Parameter(torch.zeros(3, 2, 7))]
    scale = torch.tensor([0.01, 1.0, 9.0])[:, None, None]
    for parameter in stacked:
        parameter.grad = torch.randn_like(parameter) * scale
    alone = []
    for subject in range(3):
        mine = [torch.nn.Parameter(torch.zeros_like(p[subject])) for p in stacked]
        for parameter, whole in zip(mine, stacked, strict=True):
            assert whole.grad is not None
            parameter.grad = whole.grad[subject].clone()
        alone.append((torch.nn.utils.clip_grad_norm_(mine, 1.0), mine))
    assert clip_each(stacked, 1.0) == pytest.approx(max(float(norm) for norm, _ in alone))
    for subject, (_, mine) in enumerate(alone):
        for parameter, whole in zip(mine, stacked, strict=True):
            assert whole.grad is not None
            torch.testing.assert_close(parameter.grad, whole.grad[subject])

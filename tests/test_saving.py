"""What a run needs is counted, and saved where it would not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from bksdm_tune.adapters import inject
from bksdm_tune.cli import main
from bksdm_tune.dreambooth import saving
from bksdm_tune.dreambooth.config import Config, Model, Output, PriorPreservation, Training, Who
from bksdm_tune.dreambooth.job import Job, prepare, with_training
from bksdm_tune.errors import UsageError
from bksdm_tune.kept import Count, count
from bksdm_tune.runs import occupy


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_pipeline(tmp_path_factory.mktemp("parts") / "tiny-base", size="base")


def job_of(backbone: Path, out: Path, lora: bool = False, **training: Any) -> Job:
    return prepare(
        Config(
            Who("dog"),
            Model(str(backbone), lora=lora),
            prior=PriorPreservation("none"),
            training=Training(**training),
            output=Output(out),
        ),
        "cpu",
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is free; no backbone is too small to be counted, or beside the libraries."""
    monkeypatch.setattr(saving, "NEGLIGIBLE", 0)
    monkeypatch.setattr(saving, "WORKSPACE", 0)

    def give(amount: float) -> None:
        monkeypatch.setattr(saving, "free_bytes", lambda device: amount)

    return give


def counted(rows: int, device: str) -> Count:
    with torch.device(device):
        unet = tiny.make_unet(size="base").to(device).train()
        inject(unet, 2, 3.0, 0.0, ("to_q", "to_v"))
        noisy = torch.randn(rows, 4, 32, 32)
        text = torch.randn(rows, 77, tiny.TEXT_WIDTH)
        return count(unet, (noisy, torch.zeros(rows, dtype=torch.int64), text))


def test_without_data_the_same_is_counted() -> None:
    real, fake = counted(2, "cpu"), counted(2, "meta")
    for checkpointing in (False, True):
        assert fake.bytes(checkpointing) == pytest.approx(real.bytes(checkpointing), rel=0.03)


def test_counts_grow_with_the_rows_and_shrink_under_checkpointing() -> None:
    one, four = counted(1, "meta"), counted(4, "meta")
    assert four.bytes(False) == pytest.approx(4 * one.bytes(False), rel=0.05)
    assert four.bytes(True) < four.bytes(False) / 2


def test_a_heap_takes_more_than_is_kept(backbone: Path, tmp_path: Path) -> None:
    job = job_of(backbone, tmp_path / "run", precision="no")
    here, there = saving.need(job), saving.need(replace(job, device="cuda"))
    more = (saving.HEAP - 1) * here.kept.bytes(False)
    assert here.bytes(False, "adamw") - there.bytes(False, "adamw") == pytest.approx(more) != 0


def test_what_fits_is_left_as_it_is(backbone: Path, tmp_path: Path, free: Any) -> None:
    job = job_of(backbone, tmp_path / "run")
    free(1e12)
    assert saving.settle(job) == (job, None)


def test_savings_come_one_by_one(
    backbone: Path, tmp_path: Path, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "check_optimiser", lambda name: None)
    job = replace(job_of(backbone, tmp_path / "run", precision="fp16"), device="cuda")
    wanted = saving.need(job)
    asked, less, least = (
        wanted.bytes(*level) for level in ((False, "adamw"), (True, "adamw"), (True, "adamw8bit"))
    )
    assert asked > less > least
    for bytes_, (checkpointing, optimiser) in (
        (less, (True, "adamw")),
        (least, (True, "adamw8bit")),
    ):
        free(1.01 * bytes_ / saving.USABLE)
        settled, told = saving.settle(job)
        training = settled.config.training
        assert (training.gradient_checkpointing, training.optimiser) == (checkpointing, optimiser)
        assert told and "gradient checkpointing is on" in told and "may not fit" not in told
        assert ("adamw8bit" in told) == (optimiser == "adamw8bit")
    free(0.5 * least)
    assert "it may not fit" in (saving.settle(job)[1] or "")
    as_asked = with_training(job, memory="as-asked")
    assert saving.settle(as_asked) == (as_asked, None)


def test_a_lora_keeps_its_optimiser_and_so_does_a_machine_without_the_library(
    backbone: Path, tmp_path: Path, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise UsageError("no bitsandbytes")

    free(1.0)
    lora = replace(job_of(backbone, tmp_path / "a", lora=True, precision="fp16"), device="cuda")
    assert saving.settle(lora)[0].config.training.optimiser == "adamw"
    monkeypatch.setattr(saving, "check_optimiser", missing)
    full = replace(job_of(backbone, tmp_path / "b", precision="fp16"), device="cuda")
    assert saving.settle(full)[0].config.training.optimiser == "adamw"


def test_checkpointing_is_no_other_run_but_the_optimiser_is(
    backbone: Path, tmp_path: Path, free: Any
) -> None:
    job = job_of(backbone, tmp_path / "run")
    assert with_training(job, gradient_checkpointing=True).key == job.key
    small = with_training(job, optimiser="adamw8bit")
    assert small.key != job.key
    (tmp_path / "run").mkdir()
    occupy(tmp_path / "run", small.facts, "run", "another run")
    free(1e12)
    again, _ = saving.settle(job)
    assert again.key == small.key  # whatever is free when it goes on


def test_the_run_says_what_was_saved(
    backbone: Path, tmp_path: Path, free: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["dreambooth", "--subject", "dog", "--lora", "--backbone", str(backbone)]
    words += ["--steps", "2", "--prior", "none", "--preview-prompts", "--out", str(out)]
    free(1.0)
    assert main(words) == 0
    assert "gradient checkpointing is on" in capsys.readouterr().out
    assert "gradient_checkpointing = true" in (out / "config.toml").read_text()
    free(1e12)
    assert main(words) == 0
    assert "finished already" in capsys.readouterr().out

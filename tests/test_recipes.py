"""Recipes fill what the user left unset, and nothing else."""

from __future__ import annotations

from dataclasses import fields

import pytest

from bksdm_tune.config import parse
from bksdm_tune.dreambooth.config import Config
from bksdm_tune.dreambooth.recipes import ROWS, filled, recipe_name


def flags(*words: str) -> Config:
    return parse(Config, ["--subject", "dog", *words], "dreambooth")


def test_the_reference_recipe_to_the_letter() -> None:
    """protocols.md 2.1: nota-ai/BK-SDM, scripts/finetune_full and finetune_lora."""
    config = filled(flags("--lora"), "bksdm", "lora", 512)
    training, lora, prior = config.training, config.lora, config.prior
    assert (training.steps, training.batch_size, training.learning_rate) == (800, 1, 1e-4)
    assert (training.lr_scheduler, training.train_text_encoder) == ("constant", True)
    assert (lora.rank, lora.alpha, lora.text_encoder_rank, lora.text_encoder_alpha) == (
        16, 27.0, 16, 17.0,
    )  # fmt: skip
    assert (prior.prior, prior.prior_weight, prior.class_images) == ("images", 1.0, 200)
    assert filled(flags(), "bksdm", "full", 512).training.learning_rate == 1e-6


@pytest.mark.parametrize("column", ["bksdm", "full-size", "miniature"])
def test_a_set_flag_wins_over_every_recipe(column: str) -> None:
    given = ("--steps", "7", "--prior-weight", "0.5", "--lr-scheduler", "linear")
    config = filled(flags(*given, "--train-text-encoder", "false"), column, "lora", 64)
    assert (config.training.steps, config.prior.prior_weight) == (7, 0.5)
    assert config.training.lr_scheduler == "linear"
    assert config.training.train_text_encoder is False


@pytest.mark.parametrize("column", ["bksdm", "full-size", "miniature"])
def test_no_recipe_flag_stays_unset(column: str) -> None:
    config = filled(flags(), column, "full", 64)
    groups = [getattr(config, field.name) for field in fields(config)]
    for key in ROWS:
        name = key.partition("/")[0]
        (group,) = [group for group in groups if hasattr(group, name)]
        assert getattr(group, name) is not None, name
    assert config.training.resolution == 64
    assert config.training.text_encoder_lr == config.training.learning_rate


@pytest.mark.parametrize(("words", "value"), [((), None), (("true",), True), (("False",), False)])
def test_the_text_encoder_switch(words: tuple[str, ...], value: bool | None) -> None:
    given = ("--train-text-encoder", *words) if words else ()
    assert flags(*given).training.train_text_encoder is value
    assert flags("--train-text-encoder", "--steps", "3").training.train_text_encoder is True


def test_a_wrong_switch_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        flags("--train-text-encoder", "maybe")
    assert stopped.value.code == 2
    assert "true or false" in capsys.readouterr().err


@pytest.mark.parametrize(("resolution", "name"), [(64, "miniature"), (512, "full-size")])
def test_the_recipe_follows_the_backbone(resolution: int, name: str) -> None:
    assert recipe_name("default", resolution) == name
    assert recipe_name("bksdm", resolution) == "bksdm"

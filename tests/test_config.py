"""Config dataclasses: flags, TOML, and the way back."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from bksdm_tune.config import check_positive, check_range, load_toml, parse, save_toml
from bksdm_tune.errors import UsageError


@dataclass(frozen=True)
class Loop:
    steps: int = 400
    """Optimiser steps."""
    learning_rate: float = 1e-4
    """Of the U-Net."""
    clip: float | None = 1.0
    """Largest gradient norm."""
    prior: Literal["images", "prediction", "none"] = "images"
    """How the class is kept."""

    def __post_init__(self) -> None:
        check_range("--steps", self.steps, low=1)


@dataclass(frozen=True)
class Config:
    """Tune a model."""

    subject: str | None = None
    """Name of a subject."""
    lora: bool = False
    """Train an adapter."""
    out: Path | None = None
    """Run folder."""
    prompts: tuple[str, ...] = ("a dog",)
    """Prompts of the previews."""
    size: tuple[int, int] = (64, 64)
    """Width and height."""
    loop: Loop = field(default_factory=Loop)
    """Training loop."""


FULL = Config(
    subject='rex "the\ndog" \\ žluťoučký 犬 \t',
    lora=True,
    out=Path("runs/a b"),
    prompts=("one", "", 'two "quoted"'),
    size=(96, 64),
    loop=Loop(steps=7, learning_rate=0.1 + 0.2, clip=None, prior="none"),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


@pytest.mark.parametrize("config", [Config(), FULL, replace(FULL, prompts=())])
def test_a_config_survives_the_round_trip(file: Path, config: Config) -> None:
    save_toml(file, config)
    loaded = load_toml(file, Config)
    assert loaded == config
    assert type(loaded.out) is type(config.out)


def test_the_file_is_plain_toml(file: Path) -> None:
    save_toml(file, FULL)
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    assert table["loop"]["learning_rate"] == 0.30000000000000004
    assert table["out"] == "runs/a b"
    assert table["size"] == [96, 64]


def test_none_is_left_out_where_it_is_the_default(file: Path) -> None:
    save_toml(file, Config())
    assert "subject" not in file.read_text()


def test_missing_keys_take_the_default(file: Path) -> None:
    file.write_text("[loop]\nlearning_rate = 1\n")
    config = load_toml(file, Config)
    assert config == Config(loop=Loop(learning_rate=1.0))
    assert type(config.loop.learning_rate) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[loop]\nstpes = 3", "unknown key loop.stpes. Did you mean loop.steps?"),
        ("steps = 3", "unknown key steps. Did you mean loop.steps?"),
        ("learning-rate = 3", "unknown key learning-rate. Did you mean loop.learning_rate?"),
        ("zzz = 3", "unknown key zzz."),
        ("lora = 1", "lora must be true or false; you gave 1."),
        ("subject = 3", "subject must be a string; you gave 3."),
        ("size = [1, 2, 3]", "size must be an array"),
        ("prompts = ['a', 2]", "prompts[1] must be a string; you gave 2."),
        ("loop = 3", "loop must be a table; you gave 3."),
        ("[loop]\nsteps = 2.5", "loop.steps must be an integer; you gave 2.5."),
        ("[loop]\nsteps = true", "loop.steps must be an integer; you gave True."),
        ("[loop]\nsteps = '3'", "loop.steps must be an integer; you gave '3'."),
        ("[loop]\nclip = 'some'", "loop.clip must be a number; you gave 'some'."),
        ("[loop]\nprior = 'image'", "must be one of 'images', 'prediction', 'none'; you gave"),
        ("[loop]\nsteps = 0", "--steps must be 1 or more; you gave 0."),
        ("lora = ", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_key(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        load_toml(file, Config)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_a_usage_error(file: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_toml(file, Config)


@dataclass(frozen=True)
class Required:
    name: str


def test_a_key_without_a_default_must_be_there(file: Path) -> None:
    file.write_text("")
    with pytest.raises(UsageError, match="name is missing"):
        load_toml(file, Required)


def test_flags_need_no_prefix_and_use_hyphens() -> None:
    config = parse(
        Config,
        "--subject dog --lora --out runs/x --prompts a b --size 1 2 --learning-rate 2 --clip None"
        " --prior prediction".split(),
        prog="x",
    )
    loop = Loop(learning_rate=2.0, clip=None, prior="prediction")
    assert config == Config("dog", True, Path("runs/x"), ("a", "b"), (1, 2), loop)


@pytest.mark.parametrize("flag", [["--config", "FILE"], ["--config=FILE"]])
def test_flags_override_the_config_file(file: Path, flag: list[str]) -> None:
    save_toml(file, FULL)
    words = [word.replace("FILE", str(file)) for word in flag]
    config = parse(Config, ["--no-lora", *words, "--steps", "9"], prog="x")
    assert config == replace(FULL, lora=False, loop=replace(FULL.loop, steps=9))


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--config", "a", "--config", "b"]])
def test_config_takes_one_file(argv: list[str]) -> None:
    with pytest.raises(UsageError, match="--config FILE.toml"):
        parse(Config, argv, prog="x")


def test_help_shows_every_field_and_the_config_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"], prog="x")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in ("Tune a model.", "--config FILE.toml", "--learning-rate FLOAT", "Run folder."):
        assert text in shown


def test_a_flag_out_of_range_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--steps", "0"], prog="x")
    assert stop.value.code == 2
    assert "--steps must be 1 or more; you gave 0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "low", "high", "message"),
    [
        (1.5, 0, 1, "--x must be from 0 to 1; you gave 1.5."),
        (-1, 0, math.inf, "--x must be 0 or more; you gave -1."),
        (9, -math.inf, 8, "--x must be at most 8; you gave 9."),
        (math.nan, 0, 1, "you gave nan."),
        (math.inf, 0, math.inf, "you gave inf."),
    ],
)
def test_check_range_names_flag_and_bounds(
    value: float, low: float, high: float, message: str
) -> None:
    with pytest.raises(UsageError) as error:
        check_range("--x", value, low, high)
    assert message in str(error.value)


def test_bounds_and_none_pass() -> None:
    check_range("--x", 0, 0, 1)
    check_range("--x", 1, 0, 1)
    check_range("--x", None, 0, 1)
    check_positive("--x", None)
    check_positive("--x", 1e-12)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_check_positive_refuses(value: float) -> None:
    with pytest.raises(UsageError, match="--x must be greater than 0"):
        check_positive("--x", value)

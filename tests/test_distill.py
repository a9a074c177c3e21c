"""``bksdm-tune distill`` and ``cache`` on a tiny random teacher."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from bksdm_tune.artifacts import MANIFEST, read_manifest, verify_manifest
from bksdm_tune.checkpoints import list_checkpoints
from bksdm_tune.cli import main
from bksdm_tune.loop import fit
from bksdm_tune.resolve import resolve
from distill import dry_run
from distill import train as distill_train
from pairs import image_folder, shards
from tiny import make_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "pairs")


def run(teacher: Path, data: Path, out: Path, *flags: str, steps: int = 5) -> int:
    models = ["--size", "tiny", "--teacher", str(teacher), "--data", str(data), "--out", str(out)]
    few = ["--steps", str(steps), "--batch-size", "2", "--accumulation", "2", "--workers", "1"]
    rest = ["--learning-rate", "1e-3", "--ema", "0.9", "--tracker", "none"]
    return main(["distill", *models, *few, *rest, *flags])


def log(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "seconds"} for line in lines]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / UNET).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def done(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run whose epochs (3.5 micro-batches) end inside a step."""
    out = tmp_path_factory.mktemp("run") / "student"
    assert run(teacher, data, out, "--caption-dropout", "0.3") == 0
    return out


def test_the_student_is_a_pipeline_of_diffusers(done: Path, teacher: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(done)
    assert len(pipe.unet.up_blocks) == 3 and pipe.unet.mid_block is None
    half = load_file(done / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(half["conv_in.weight"], pipe.unet.conv_in.weight.half())
    UNet2DConditionModel.from_pretrained(done / "unet", variant="fp16")
    before = UNet2DConditionModel.from_pretrained(teacher / "unet").conv_in.weight
    assert not torch.equal(pipe.unet.conv_in.weight, before)
    assert resolve(str(done)).unet == done / "unet"
    manifest = verify_manifest(done, "distilled")
    assert manifest["results"]["pictures_a_step"] == 4
    card = (done / "README.md").read_text()
    assert "license: creativeml-openrail-m" in card and "OpenRAIL" in card


def test_what_is_delivered_is_the_average(done: Path) -> None:
    from bksdm_tune.checkpoints import STATE_FILE, load_tree

    _, last = list_checkpoints(done)[-1]
    shadow = load_tree(last / STATE_FILE)["ema"]["shadow"]
    delivered = UNet2DConditionModel.from_pretrained(done / "unet")
    for parameter, average in zip(delivered.parameters(), shadow, strict=True):
        assert torch.equal(parameter, average)
    assert not torch.equal(load_file(last / UNET)["conv_in.weight"], shadow[0])


def test_the_cache_gives_the_losses_of_the_pictures(
    done: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    for embeds in ([], ["--embeds"]):
        cache, out = tmp_path / f"cache{len(embeds)}", tmp_path / f"run{len(embeds)}"
        words = ["cache", "--teacher", str(teacher), "--data", str(data), "--out", str(cache)]
        assert main([*words, *embeds, "--workers", "1"]) == 0
        assert run(teacher, cache, out, "--caption-dropout", "0.3") == 0
        assert log(out) == log(done)
        assert digest(out) == digest(done)


def test_shards_train_and_resume(teacher: Path, tmp_path: Path) -> None:
    tars = shards(tmp_path / "tars")
    assert run(teacher, tars, tmp_path / "whole") == 0
    assert run(teacher, tars, tmp_path / "cut", steps=3) == 0
    assert run(teacher, tars, tmp_path / "cut") == 0
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


@pytest.mark.parametrize("change", ["vae", "resolution"])
def test_the_cache_of_another_model_is_refused(
    change: str, teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_pipeline(tmp_path / "other", seed=1) if change == "vae" else teacher
    flags = ["--resolution", "64"] if change == "resolution" else []
    words = ["cache", "--teacher", str(other), "--data", str(data), "--out", str(tmp_path / "c")]
    assert main([*words, *flags, "--workers", "1"]) == 0
    assert run(teacher, tmp_path / "c", tmp_path / "run") == 3
    error = capsys.readouterr().err
    assert f"another {change}" in error and "bksdm-tune cache --teacher" in error
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("change", ["crop", "text_encoder"])
def test_a_cache_made_in_another_way_is_refused(
    change: str, teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "c"
    words = ["cache", "--teacher", str(teacher), "--data", str(data), "--out", str(cache)]
    assert main([*words, "--embeds", "--workers", "1"]) == 0
    manifest = read_manifest(cache)
    assert manifest["config"][change]
    manifest["config"][change] = "another"
    (cache / MANIFEST).write_text(json.dumps(manifest))
    assert run(teacher, cache, tmp_path / "run") == 3
    assert f"another {change}" in capsys.readouterr().err


class Killed(Exception):
    """Stands for a kill: nobody catches it."""


@pytest.mark.parametrize("died_at", [3, 7])
def test_killed_and_resumed_ends_with_the_same_bytes(
    died_at: int, done: Path, teacher: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In mid-epoch, with accumulation and EMA, and with another checkpoint cadence."""
    calls: list[int] = []

    def dying(objective: Any, *args: Any, **options: Any) -> None:
        def mortal(batch: Any) -> Any:
            calls.append(1)
            if len(calls) == died_at:
                raise Killed
            return objective(batch)

        fit(mortal, *args, **options)

    monkeypatch.setattr(distill_train, "fit", dying)
    flags = ["--caption-dropout", "0.3", "--checkpoint-every", "1"]
    with pytest.raises(Killed):
        run(teacher, data, tmp_path / "run", *flags)
    monkeypatch.undo()
    assert not (tmp_path / "run" / MANIFEST).exists()
    assert run(teacher, data, tmp_path / "run", *flags) == 0
    assert log(tmp_path / "run") == log(done)
    assert digest(tmp_path / "run") == digest(done)


def test_pictures_and_checkpoints_change_nothing(
    done: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    pictures = ["--preview-prompts", "a dog", "a cat", "--preview-every", "2"]
    often = ["--checkpoint-every", "2", "--keep", "2"]
    out = tmp_path / "run"
    assert run(teacher, data, out, "--caption-dropout", "0.3", *pictures, *often) == 0
    assert log(out) == log(done) and digest(out) == digest(done)
    assert [step for step, _ in list_checkpoints(out)] == [4, 5]
    names = [path.name for path in sorted((out / "samples").glob("*.png"))]
    assert names == [f"step-{step:06d}.png" for step in (0, 2, 4, 5)]
    assert Image.open(out / "samples/step-000005.png").height > 3 * 160  # three rows


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--lambda-feat", "0"], {"task", "out"}),
        (["--lambda-out", "0", "--lambda-task", "0"], {"feat"}),
        (["--lambda-out", "0", "--lambda-feat", "0", "--min-snr-gamma", "5"], {"task"}),
        (["--features", "up_blocks.2"], {"task", "out", "feat"}),
    ],
)
def test_terms_come_and_go(
    flags: list[str], names: set[str], teacher: Path, data: Path, tmp_path: Path
) -> None:
    assert run(teacher, data, tmp_path / "run", *flags, steps=1) == 0
    (line,) = log(tmp_path / "run")
    assert line.keys() == names | {"step", "lr", "loss"}


def test_random_start_and_checkpointing(teacher: Path, data: Path, tmp_path: Path) -> None:
    random = run(teacher, data, tmp_path / "a", "--init", "random", "--lambda-feat", "0", steps=1)
    saved = run(teacher, data, tmp_path / "b", "--gradient-checkpointing", steps=2)
    plain = run(teacher, data, tmp_path / "c", steps=2)
    assert random == saved == plain == 0
    for one, other in zip(log(tmp_path / "b"), log(tmp_path / "c"), strict=True):
        assert one == pytest.approx(other)
    assert log(tmp_path / "a")[0]["out"] != log(tmp_path / "c")[0]["out"]


def test_broken_pictures_are_skipped_listed_and_may_be_too_many(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_folder(tmp_path / "pairs", broken=(2,))
    assert run(teacher, data, tmp_path / "few", "--max-broken", "0.2") == 0
    (line,) = (tmp_path / "few/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "2.png"
    assert read_manifest(tmp_path / "few")["results"]["rows_skipped"] == 1
    many = image_folder(tmp_path / "many", count=30, broken=tuple(range(10)))
    assert run(teacher, many, tmp_path / "run", "--max-broken", "0.01") == 3
    assert "--max-broken" in capsys.readouterr().err


def test_velocity_teachers_train_on_velocity(tmp_path: Path, data: Path) -> None:
    v2 = make_pipeline(tmp_path / "v2", v2=True, v_prediction=True)
    epsilon = make_pipeline(tmp_path / "epsilon", v2=True)
    assert run(v2, data, tmp_path / "a", steps=1) == run(epsilon, data, tmp_path / "b", steps=1)
    (a,), (b,) = log(tmp_path / "a"), log(tmp_path / "b")
    assert a["task"] != b["task"] and a["out"] == b["out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "huge"], "--size huge is unknown; choose from base, small, tiny"),
        (["--features", "mid_block"], "choose from down_blocks.0"),
        (["--data", "nowhere"], "is no data set"),
        (["--lambda-task", "0", "--lambda-out", "0", "--lambda-feat", "0"], "nothing to learn"),
        (["--resolution", "36"], "does not divide by"),
        (["--accumulation", "0"], "--accumulation must be 1 or more"),
    ],
)
def test_wrong_flags_stop_before_anything(
    flags: list[str], message: str, teacher: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    try:
        code: Any = run(teacher, data, tmp_path / "run", *flags)
    except SystemExit as stop:  # from the parser, which prints in a box
        code = stop.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_another_batch_in_the_same_folder_is_refused(
    done: Path, teacher: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(teacher, data, done, "--caption-dropout", "0.3", "--accumulation", "3") == 2
    assert "pictures a step" in capsys.readouterr().err
    assert run(teacher, data, done, "--caption-dropout", "0.3") == 0
    assert "finished already" in capsys.readouterr().out


def test_dry_run_measures_and_leaves_nothing(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(teacher, data, tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "the largest batch tried that fits is 2" in said and "pictures/s" in said
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_fed(teacher: Path, data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(teacher, data, tmp_path / "run", "--tracker", "tensorboard", steps=3) == 0
    (folder,) = (tmp_path / "run/tracker").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    values = [event.value for event in events.Scalars("feat")]
    assert values == pytest.approx([line["feat"] for line in log(tmp_path / "run")])
    assert read_manifest(tmp_path / "run")["kind"] == "distilled"


def test_the_cache_keeps_the_places_of_broken_pictures(teacher: Path, tmp_path: Path) -> None:
    data = image_folder(tmp_path / "pairs", broken=(2, 3))
    flags = ["--max-broken", "0.5"]
    assert run(teacher, data, tmp_path / "pixels", *flags) == 0
    words = ["cache", "--teacher", str(teacher), "--data", str(data), "--workers", "1"]
    assert main([*words, "--out", str(tmp_path / "cache"), *flags]) == 0
    assert run(teacher, tmp_path / "cache", tmp_path / "cached") == 0
    assert log(tmp_path / "cached") == log(tmp_path / "pixels")


def test_a_batch_of_broken_pictures_takes_the_next_good_one(teacher: Path, tmp_path: Path) -> None:
    data = image_folder(tmp_path / "pairs", broken=(2, 3))
    flags = ["--max-broken", "0.5", "--batch-size", "1", "--accumulation", "2"]
    assert run(teacher, data, tmp_path / "whole", *flags, steps=8) == 0
    assert run(teacher, data, tmp_path / "cut", *flags, steps=3) == 0
    assert run(teacher, data, tmp_path / "cut", *flags, steps=8) == 0
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert len((tmp_path / "cut/skipped.jsonl").read_text().splitlines()) == 2


def test_a_flipped_bit_in_the_cache_is_found(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    words = ["cache", "--teacher", str(teacher), "--data", str(data), "--out", str(cache)]
    assert main([*words, "--workers", "1"]) == 0
    (shard,) = cache.glob("shard-*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-9] ^= 1
    shard.write_bytes(damaged)
    assert run(teacher, cache, tmp_path / "run") == 3
    assert "damaged" in capsys.readouterr().err
    assert main([*words, "--workers", "1"]) == 0
    assert run(teacher, cache, tmp_path / "run") == 0


def test_dry_run_says_when_nothing_fits(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dry_run, "step_seconds", full)
    assert run(teacher, data, tmp_path / "run", "--dry-run") == 3
    assert "batch of 1" in capsys.readouterr().err


@pytest.mark.parametrize("most", [1, 3, 21, 64, 100])
def test_the_largest_batch_is_found_to_an_eighth(most: int) -> None:
    found = dry_run.largest(lambda size: size <= most, 64)
    assert found <= min(most, 64) <= found + max(1, found // 8)
    assert dry_run.largest(lambda size: False, 64) == 0

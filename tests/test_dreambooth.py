"""The main job on a tiny random pipeline: what it leaves behind, and how it resumes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from bksdm_tune.artifacts import locked, read_manifest, verify_manifest
from bksdm_tune.cli import main
from tiny import make_pipeline

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("backbone") / "base", size="base")


def run(backbone: Path, out: Path, *flags: str, steps: int = 4) -> int:
    fixed = ["--subject", "dog", "--backbone", str(backbone), "--out", str(out)]
    few = ["--preview-prompts", "a {subject} in the snow", "--preview-images", "1"]
    return main(["dreambooth", *fixed, *few, "--steps", str(steps), *flags])


def weights(folder: Path) -> dict[str, str]:
    """Hash of each weight file that a run leaves at its top level or in its model folders."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    own = [path for path in files if "checkpoint" not in path.parent.name]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in own
    }


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "checkpoint" in path.name}


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


def test_lora_run_folder_explains_itself(backbone: Path, tmp_path: Path) -> None:
    assert run(backbone, tmp_path / "run", "--lora") == 0
    manifest = verify_manifest(tmp_path / "run", "dreambooth-lora")
    wanted = {"README.md", "config.toml", "log.jsonl", "contact-sheet.png", LORA}
    assert wanted <= set(manifest["files"])
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == 2  # before and after
    sample = Image.open(next((tmp_path / "run/samples").glob("*.png")))
    assert sample.text["prompt"] == "a sks11df dog in the snow"  # type: ignore[attr-defined]
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]


def test_diffusers_names_lora(backbone: Path, tmp_path: Path) -> None:
    """diffusers examples/dreambooth/test_dreambooth_lora.py, test_dreambooth_lora*"""
    frozen = ["--lora", "--prior", "none", "--train-text-encoder", "false"]
    assert run(backbone, tmp_path / "a", *frozen) == 0
    keys = load_file(tmp_path / "a" / LORA).keys()
    assert keys and all("lora" in key and key.startswith("unet") for key in keys)
    assert run(backbone, tmp_path / "b", "--lora", "--prior", "none", "--train-text-encoder") == 0
    keys = load_file(tmp_path / "b" / LORA).keys()
    assert any(key.startswith("text_encoder.text_model.") for key in keys)
    assert all(key.startswith(("unet.", "text_encoder.")) for key in keys)


@pytest.mark.parametrize("method", [["--lora"], []])
def test_diffusers_checkpoint_rotation_and_resume(
    backbone: Path, tmp_path: Path, method: list[str]
) -> None:
    """diffusers test_dreambooth*_checkpointing_checkpoints_total_limit*"""
    flags = ["--prior", "none", "--checkpointing-steps", "2", "--lr-scheduler", "constant", *method]
    assert run(backbone, tmp_path / "run", *flags) == 0
    assert checkpoints(tmp_path / "run") == {"checkpoint-2", "checkpoint-4"}
    assert run(backbone, tmp_path / "run", *flags, "--checkpoints-total-limit", "2", steps=8) == 0
    assert checkpoints(tmp_path / "run") == {"checkpoint-6", "checkpoint-8"}
    assert read_manifest(tmp_path / "run")["results"]["steps"] == 8


def test_full_run_is_a_pipeline_and_so_is_its_checkpoint(backbone: Path, tmp_path: Path) -> None:
    """diffusers test_dreambooth.py, test_dreambooth and test_dreambooth_checkpointing"""
    out = tmp_path / "run"
    assert run(backbone, out, "--checkpoint-every", "2") == 0
    assert (out / "unet/diffusion_pytorch_model.safetensors").is_file()
    assert (out / "scheduler/scheduler_config.json").is_file()
    pipe = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    pipe("photo", num_inference_steps=1)
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="checkpoint-2/unet")
    pipe = StableDiffusionPipeline.from_pretrained(backbone, unet=unet, safety_checker=None)
    pipe("photo", num_inference_steps=1)


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora", "--rank", "3", "--alpha", "7", "--train-text-encoder", "--prior", "images",
         "--class-images", "2", "--text-encoder-alpha", "5", "--learning-rate", "0.05"],
        ["--train-text-encoder", "--learning-rate", "0.01"],
    ],
)  # fmt: skip
def test_stock_diffusers_draws_what_generate_draws(
    backbone: Path, tmp_path: Path, flags: list[str]
) -> None:
    out = tmp_path / "run"
    assert run(backbone, out, *flags) == 0
    settings = ["--seed", "3", "--n", "3", "--steps", "4", "--batch-size"]
    prompt = ["generate", str(out), "--prompt", "a {subject} in the snow"]
    assert main([*prompt, *settings, "2", "--out", str(tmp_path / "ours")]) == 0
    assert main([*prompt, *settings, "3", "--out", str(tmp_path / "other batch")]) == 0
    lora = "--lora" in flags
    pipe = StableDiffusionPipeline.from_pretrained(backbone if lora else out, safety_checker=None)
    untuned = pipe("a sks11df dog", num_inference_steps=2, generator=torch.manual_seed(3)).images[0]
    if lora:
        pipe.load_lora_weights(out)
        tuned = pipe("a sks11df dog", num_inference_steps=2, generator=torch.manual_seed(3))
        assert np.abs(np.asarray(untuned, int) - np.asarray(tuned.images[0], int)).max() > 2
    for index, ours in enumerate(pictures(tmp_path / "ours")):
        theirs = pipe(
            "a sks11df dog in the snow",
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(3 + index),
        ).images[0]
        assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1
    pairs = zip(pictures(tmp_path / "ours"), pictures(tmp_path / "other batch"), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) <= 1
    assert len(pictures(tmp_path / "ours")) == 3


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads in this process and in those that it starts; two bring the twin."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(request.param))
        torch.set_num_threads(request.param)
        yield request.param
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("method", "threads"),
    [(["--lora"], 2), (["--ema", "0.9"], 1)],
    indirect=["threads"],
)
def test_killed_three_times_ends_with_the_same_bytes(
    backbone: Path, tmp_path: Path, method: list[str], threads: int
) -> None:
    flags = ["--checkpoint-every", "3", "--accumulation", "2", *method]
    assert run(backbone, tmp_path / "whole", *flags, steps=20) == 0
    command = [sys.executable, "-m", "bksdm_tune", "dreambooth", "--subject", "dog"]
    command += ["--backbone", str(backbone), "--out", str(tmp_path / "killed"), "--steps", "20"]
    command += ["--preview-prompts", "a {subject} in the snow", "--preview-images", "1", *flags]
    log = tmp_path / "killed/log.jsonl"
    for after in (4, 11, 17):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            lines = log.read_text().splitlines() if log.is_file() else []
            if lines and json.loads(lines[-1])["step"] >= after:
                break
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed/manifest.json").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert len(weights(tmp_path / "whole")) == (1 if "--lora" in method else 3)


def test_previews_and_checkpoints_do_not_change_the_result(backbone: Path, tmp_path: Path) -> None:
    assert run(backbone, tmp_path / "a", "--lora") == 0
    assert run(backbone, tmp_path / "b", "--lora", "--preview-every", "1",
               "--checkpoint-every", "1") == 0  # fmt: skip
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_finished_run_is_left_alone(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(backbone, tmp_path / "run", "--lora") == 0
    before = (tmp_path / "run/manifest.json").stat().st_mtime_ns
    assert run(backbone, tmp_path / "run", "--lora") == 0
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "run/manifest.json").stat().st_mtime_ns == before


def test_another_run_in_the_folder_is_refused(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(backbone, tmp_path / "run", "--lora") == 0
    assert run(backbone, tmp_path / "run", "--lora", "--rank", "2") == 2
    assert "config.lora.rank" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert run(backbone, tmp_path / "mine", "--lora") == 2
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.name != ".lock"] == [
        "thesis.txt"
    ]


def test_a_second_run_is_refused_while_the_first_lives(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "run"):
        assert run(backbone, tmp_path / "run", "--lora") == 2
    assert "Another run is writing" in capsys.readouterr().err


def test_full_disk_keeps_the_last_checkpoint(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bksdm_tune import checkpoints

    real, calls = checkpoints.save_file, []

    def fill_up(*arguments: object, **named: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(*arguments, **named)

    flags = ["--lora", "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", fill_up)
        assert run(backbone, tmp_path / "run", *flags) == 3
    names = {path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name}
    assert names == {"checkpoint-2"}
    assert run(backbone, tmp_path / "run", *flags) == 0
    assert run(backbone, tmp_path / "whole", *flags) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_config_file_reproduces_the_run(backbone: Path, tmp_path: Path) -> None:
    assert run(backbone, tmp_path / "a", "--lora", "--rank", "2") == 0
    config = str(tmp_path / "a/config.toml")
    assert main(["dreambooth", "--config", config, "--out", str(tmp_path / "b")]) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_adapter_on_another_size_is_refused(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(backbone, tmp_path / "run", "--lora") == 0
    small = make_pipeline(tmp_path / "small", size="small")
    command = ["generate", str(tmp_path / "run" / LORA), "--prompt", "a dog"]
    assert main([*command, "--backbone", str(small), "--out", str(tmp_path / "p")]) == 3
    assert "wrong places" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_dry_run_measures_and_leaves_nothing(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--precision", "bf16", "--ema", "0.9"]):
        assert run(backbone, tmp_path / "run", "--lora", "--dry-run", *more) == 0
        assert "s a step" in capsys.readouterr().out
        assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert run(backbone, tmp_path / "mine", "--lora", "--dry-run") == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_class_images_are_shared_between_subjects(
    backbone: Path, tmp_path: Path, own_cache: Path
) -> None:
    flags = ["--lora", "--prior", "images", "--class-images", "2"]
    assert run(backbone, tmp_path / "a", *flags) == 0
    (folder,) = (own_cache / "class-images").iterdir()
    made = (folder / "class-0000.png").stat().st_mtime_ns
    common = ["--backbone", str(backbone), "--out", str(tmp_path / "b"), "--steps", "1"]
    assert main(["dreambooth", "--subject", "dog2", *flags, *common]) == 0
    assert [path.name for path in (own_cache / "class-images").iterdir()] == [folder.name]
    assert (folder / "class-0000.png").stat().st_mtime_ns == made


def test_own_photos_and_every_bad_file_in_one_report(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "rex"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(photos / name)
    (photos / ".DS_Store").write_text("x")
    flags = ["--photos", str(photos), "--class-noun", "dog", "--backbone", str(backbone), "--lora"]
    out = ["--out", str(tmp_path / "run"), "--steps", "1"]
    assert main(["dreambooth", *flags, *out]) == 0
    (photos / "broken.jpg").write_text("no picture")
    Image.fromarray(rng.integers(0, 255, (5, 5, 3), np.uint8)).save(photos / "tiny.png")
    capsys.readouterr()
    assert main(["dreambooth", *flags, "--out", str(tmp_path / "other")]) == 3
    report = capsys.readouterr().err
    assert "broken.jpg" in report and "tiny.png" in report
    assert not (tmp_path / "other").exists()


def test_wrong_flags_are_refused_before_anything_loads(backbone: Path, tmp_path: Path) -> None:
    for flags in (
        ["--steps", "0"],
        ["--subject", "dgo"],
        ["--resolution", "50"],
        ["--instance-prompt", "a photo of zwx dog"],
        ["--name", "rex"],
        ["--attention", "xformers"],
        ["--lr-warmup-steps", "5", "--lr-scheduler", "constant"],
        ["--optimiser", "prodigy", "--text-encoder-lr", "1e-5"],
        ["--seed", "99999999999999999999"],
        ["--class-noun", " "],
    ):
        with_subject = flags if "--subject" in flags else ["--subject", "dog", *flags]
        where = ["--backbone", str(backbone), "--out", str(tmp_path / "run")]
        try:
            code = main(["dreambooth", *with_subject, *where])
        except SystemExit as error:
            code = error.code  # type: ignore[assignment]
        assert code == 2
        assert not (tmp_path / "run").exists()


def test_an_old_vae_config_without_scaling_factor_takes_the_default(tmp_path: Path) -> None:
    from bksdm_tune.dreambooth.learner import scaling_factor

    vae = make_pipeline(tmp_path / "old") / "vae"
    assert scaling_factor(vae) == 0.3
    config = json.loads((vae / "config.json").read_text())
    del config["scaling_factor"]
    (vae / "config.json").write_text(json.dumps(config))
    assert scaling_factor(vae) == 0.18215


def test_a_schedule_that_ends_fixes_the_steps(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--lora", "--prior", "none"]
    assert run(backbone, tmp_path / "cosine", *flags, steps=2) == 0
    assert run(backbone, tmp_path / "cosine", *flags, steps=3) == 2
    assert "config.training.steps" in capsys.readouterr().err
    flags += ["--lr-scheduler", "constant", "--checkpoint-every", "1"]
    assert run(backbone, tmp_path / "run", *flags, steps=3) == 0
    (tmp_path / "run/manifest.json").unlink()  # as if interrupted
    assert run(backbone, tmp_path / "run", *flags, steps=2) == 3
    assert "trained for 3 steps" in capsys.readouterr().err


def test_resuming_completes_the_folder_and_clears_it_up(backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(backbone, out, "--lora") == 0
    for name in ("manifest.json", "config.toml", "samples/step-000000-00.png"):
        (out / name).unlink()
    (out / ".checkpoint-3.abcd").mkdir()
    assert run(backbone, out, "--lora") == 0
    assert (out / "config.toml").is_file() and not (out / ".checkpoint-3.abcd").exists()
    verify_manifest(out)


def test_other_previews_are_another_run(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(backbone, tmp_path / "run", "--lora") == 0
    assert run(backbone, tmp_path / "run", "--lora", "--preview-images", "2") == 2
    assert "previews" in capsys.readouterr().err


def test_deleted_class_images_are_drawn_again(
    backbone: Path, tmp_path: Path, own_cache: Path
) -> None:
    flags = ["--lora", "--prior", "images", "--class-images", "2"]
    assert run(backbone, tmp_path / "a", *flags) == 0
    (folder,) = (own_cache / "class-images").iterdir()
    (folder / "class-0001.png").unlink()
    assert run(backbone, tmp_path / "b", *flags) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(backbone, out, "--lora", "--learning-rate", "1e30") == 3
    said = capsys.readouterr().err
    (kept,) = checkpoints(out)
    assert "not finite" in said or "The loss became" in said
    assert kept in said
    assert all(torch.isfinite(t).all() for t in load_file(out / kept / LORA).values())


def test_prodigy_learns(backbone: Path, tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    flags = ["--lora", "--optimiser", "prodigy", "--lr-scheduler", "constant", "--prior", "none"]
    assert run(backbone, tmp_path / "run", *flags, steps=12) == 0
    up = [t for key, t in load_file(tmp_path / "run" / LORA).items() if "lora_B" in key]
    assert max(t.abs().max() for t in up) > 1e-6


def test_generate_finds_what_an_adapter_was_trained_on(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    assert run(backbone, tmp_path / "run", "--lora") == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    words = ["--prompt", "a {subject}", "--steps", "2", "--out", str(tmp_path / "p")]
    for model in (tmp_path / "run", tmp_path / "run" / LORA):
        assert main(["generate", str(model), *words]) == 0
    a, b = pictures(tmp_path / "p")
    assert np.array_equal(a, b)


def test_generate_overwrites_no_other_picture(backbone: Path, tmp_path: Path) -> None:
    words = ["generate", str(backbone), "--prompt", "a dog", "--out", str(tmp_path / "p")]
    for steps in ("2", "3", "2"):
        assert main([*words, "--steps", steps]) == 0
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == ["a-dog-0-2.png", "a-dog-0.png"]


def test_generate_says_what_is_wrong_before_it_draws(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    words = ["--prompt", "a dog", "--steps", "2"]
    assert main(["generate", str(backbone), *words, "--out", str(tmp_path / "file")]) == 2
    assert main(["generate", str(backbone), *words, "--backbone", "pocket-tiny"]) == 2
    assert run(backbone, tmp_path / "run", "--lora") == 0
    (tmp_path / "run/manifest.json").unlink()
    assert main(["generate", str(tmp_path / "run"), *words]) == 3
    assert "has not finished" in capsys.readouterr().err


def test_a_run_at_another_resolution_draws_at_it(backbone: Path, tmp_path: Path) -> None:
    assert run(backbone, tmp_path / "run", "--lora", "--resolution", "64") == 0
    words = ["--prompt", "a dog", "--steps", "2", "--out", str(tmp_path / "p")]
    assert main(["generate", str(tmp_path / "run"), *words]) == 0
    assert [picture.shape for picture in pictures(tmp_path / "p")] == [(64, 64, 3)]

"""``bksdm-tune build`` writes a pipeline that stock diffusers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from bksdm_tune.artifacts import verify_manifest, write_manifest
from bksdm_tune.backbones import BACKBONES
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.resolve import ADAPTER, Parts, hash_weights, resolve
from distill.build import Config, build, card, load_unet, main
from tiny import make_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A v2-style teacher with a feature extractor and a licence file."""
    folder = make_pipeline(tmp_path_factory.mktemp("made") / "teacher", v2=True, v_prediction=True)
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "LICENSE.txt").write_text("terms")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(("size", "keys"), [("base", 442), ("small", 396), ("tiny", 358)])
def test_stock_diffusers_loads_and_runs_what_was_built(
    size: str, keys: int, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    assert main(["--size", size, "--teacher", str(teacher), "--out", str(out)]) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    assert len(pipeline.unet.state_dict()) == keys
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a dog", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)
    before, after = load_unet(teacher / "unet").num_parameters(), pipeline.unet.num_parameters()
    assert f"{before:,} -> {after:,}" in capsys.readouterr().out


def test_every_other_part_is_copied_as_it_is(teacher: Path, tmp_path: Path) -> None:
    build(Config("tiny", str(teacher), tmp_path / "student"))
    ours, theirs = files_of(tmp_path / "student"), files_of(teacher)
    copied = {name for name in theirs if name.split("/")[0] != "unet"} - {"model_index.json"}
    assert len(copied) == 9 and "feature_extractor/preprocessor_config.json" in copied
    assert {name: ours[name] for name in copied} == {name: theirs[name] for name in copied}
    assert ours.keys() - theirs.keys() == {"README.md", "manifest.json"}
    index = json.loads(ours["model_index.json"])
    assert index == json.loads(theirs["model_index.json"])


def test_the_manifest_names_the_teacher(teacher: Path, tmp_path: Path) -> None:
    build(Config("base", str(teacher), tmp_path / "student"))
    manifest = verify_manifest(tmp_path / "student", "backbone")
    assert manifest["parents"]["teacher"] == {
        "ref": str(teacher),
        "base": None,
        "unet": hash_weights(teacher / "unet"),
    }
    assert f"unet/{WEIGHTS}" in manifest["files"]
    assert resolve(str(tmp_path / "student")).unet == tmp_path / "student" / "unet"


def test_the_card_carries_licence_and_state(teacher: Path, tmp_path: Path) -> None:
    build(Config("small", str(teacher), tmp_path / "student"))
    text = (tmp_path / "student" / "README.md").read_text()
    for words in (
        "not yet distilled",
        "OpenRAIL-M",
        "Attachment A",
        "license: creativeml",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("teacher_name", "header", "words"),
    [
        ("sd-v2-1", "license: openrail++", "Open RAIL++-M"),
        ("sd-v1-5", "license: creativeml-openrail-m", "Attachment A"),
        ("pocket-teacher", "license: apache-2.0", "contain no Stable Diffusion weights"),
    ],
)
def test_the_card_states_the_licence_of_a_registered_teacher(
    teacher_name: str, header: str, words: str
) -> None:
    row = BACKBONES[teacher_name]
    text = card("tiny", Parts(row.name, row.name, None, Path(), Path(), row), 2, 1)
    assert header in text and words in text and f"Licence of {teacher_name}: {row.licence}" in text


def test_half_precision_stays_half(teacher: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(teacher, tmp_path / "half"))
    UNet2DConditionModel.from_pretrained(half / "unet").half().save_pretrained(half / "unet")
    build(Config("tiny", str(half), tmp_path / "student"))
    tensors = load_file(tmp_path / "student" / "unet" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_a_unet_alone_with_a_base(teacher: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(teacher / "unet", tmp_path / "alone"))
    build(Config("tiny", str(alone), tmp_path / "student", base=str(teacher)))
    manifest = verify_manifest(tmp_path / "student", "backbone")
    assert manifest["parents"]["teacher"]["base"] == str(teacher)
    assert (tmp_path / "student" / "vae" / WEIGHTS).is_file()


def test_a_part_that_was_not_downloaded_is_unlisted(teacher: Path, tmp_path: Path) -> None:
    partial = Path(shutil.copytree(teacher, tmp_path / "partial"))
    shutil.rmtree(partial / "feature_extractor")
    build(Config("tiny", str(partial), tmp_path / "student"))
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["feature_extractor"] == [None, None]


def test_an_out_folder_in_use_is_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="--out"):
        build(Config("tiny", str(teacher), tmp_path / "student"))
    assert [path.name for path in tmp_path.rglob("*.*")] == ["mine.txt"]


def test_an_empty_out_folder_is_filled(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    build(Config("tiny", str(teacher), tmp_path / "student"))
    verify_manifest(tmp_path / "student", "backbone")


def test_a_failed_build_leaves_nothing(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("distill.build.copy_other_parts", fail)
    with pytest.raises(OSError, match="disk full"):
        build(Config("tiny", str(teacher), tmp_path / "student"))
    assert list(tmp_path.iterdir()) == []


def test_a_student_is_refused_as_teacher(teacher: Path, tmp_path: Path) -> None:
    build(Config("base", str(teacher), tmp_path / "base"))
    with pytest.raises(UsageError, match="layers_per_block is 1, not 2"):
        build(Config("tiny", str(tmp_path / "base"), tmp_path / "student"))


def test_a_lora_run_is_refused_as_teacher(teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ADAPTER).write_bytes(b"weights")
    write_manifest(run, "dreambooth-lora", {}, {"backbone": {"ref": str(teacher)}})
    with pytest.raises(UsageError, match="LoRA run"):
        build(Config("tiny", str(run), tmp_path / "student"))


def test_an_absent_teacher_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="model_index.json"):
        build(Config("tiny", str(tmp_path / "empty"), tmp_path / "student"))
